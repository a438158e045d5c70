"One module for each selection rule. `layers.selection` imports all that are here."
