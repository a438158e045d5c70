"Models of timm as dynamic-convolution networks and back. Names are imported when they are first used."
import sys

from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    bundled="weights_path",
    cost="count",
    formulas="table3",
    paper="PAPER_BASES TABLE1 TABLE2 TABLE3 TABLE4",
    registry="create_model paper_model",
    surgery="convert to_timm",
    systems="SYSTEMS exchange",
    fitting="checkpoint_filter_fn",
    pyramid="PyramidTransformer PyramidBlock",
    mixers="MixerBlock WideValues nonlinearity",
    kept="kept_by_position kept_kernels share_kept with_topk",
)

if "timm" in sys.modules:  # the registry of timm can be filled at once; before, it is filled with the first name used
    from . import registry  # noqa: F401
