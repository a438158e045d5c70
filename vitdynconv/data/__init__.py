"Loaders whose draws are decided by seed, epoch and position."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    digits="digits_dls cluttered_digits_dls",
    shards="imagenet_dls",
)
