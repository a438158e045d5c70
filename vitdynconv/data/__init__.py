"Loaders whose draws are decided by seed, epoch and position."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    loader="EpochLoader TensorSet TensorLoader seed_from kept_randomness",
    digits="digits_dls cluttered_digits_dls",
    fashion="fashion_dls",
    images="write_imagefolder image_transforms keep_one_bit",
    shards="imagenet_dls preflight",
)
