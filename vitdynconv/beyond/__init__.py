"Beyond the paper: its future work as networks, and the way back to ConvNets."
import vitdynconv.models  # noqa: F401  first: where timm is loaded its registry imports the modules of this part
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    pyramid="PyramidTransformer PyramidBlock",
    mixers="MixerBlock WideValues nonlinearity",
    rows="convnext_rows selection_rows",
    kept="kept_kernels share_kept with_topk",
)
