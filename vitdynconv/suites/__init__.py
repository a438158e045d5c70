"What `vdc_bench` measures, a module for each kind of suite; `vitdynconv.bench` says which are there."
