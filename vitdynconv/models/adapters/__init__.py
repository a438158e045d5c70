"One module for each kind of timm model. `models.backbones` imports all that are here."
