"What every part uses: checks, atomic files, the frame of the commands."
