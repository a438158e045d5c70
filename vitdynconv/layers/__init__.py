"The derivation: convolutions static and dynamic, activations, position, selection, and the mixers made of them."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    conv="to_tokens to_map static_conv dynamic_conv dynamic_conv_grouped",
    equivalence="attention_as_convs DynamicConvBlock",
    activations="ACTIVATIONS Activation create_activation register",
    position="RelativePosition",
    selection="SELECTIONS Selection register_selection create_selection AllKernels WindowKernels ProjectedKernels "
              "NeighborhoodKernels TopKernels",
    attention="DynamicConvAttention",
    depthwise="DepthwiseSelfAttention",
    dynconv="DynamicConv2d DynamicDepthwiseConv2d Involution2d",
    kxk="KernelAttention2d",
    strided="StridedAttention",
)
