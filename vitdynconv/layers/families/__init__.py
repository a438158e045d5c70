"One module for each family of activations. `layers.activations` imports all that are here."
