"Loaders whose draws are decided by seed, epoch and position."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    loader="EpochLoader ImageData seed_from kept_randomness own_share stratified_split",
    tensors="TensorSet TensorLoader LightAugment tensor_dls",
    digits="digits_dls cluttered_digits_dls",
    fashion="fashion_dls find_fashion sample_images",
    images="write_imagefolder image_transforms keep_one_bit as_rgb",
    fingerprint="folder_summary data_fingerprint fingerprint_differences",
    imagenet="imagenet_dls preflight",
)
