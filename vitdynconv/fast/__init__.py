"Other orders of evaluation, each asserted equal to its definition."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    dispatch="dynamic_conv_attention fast_depthwise_attention accelerate",
    relative_position="relative_position",
    tiled="pointwise_attention",
)
