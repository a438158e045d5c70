"The derivation: convolutions static and dynamic, activations, position, selection, and the mixers made of them."
from vitdynconv import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    conv="to_tokens to_map static_conv dynamic_conv dynamic_conv_grouped",
    equivalence="attention_as_convs DynamicConvBlock",
    activations="ACTIVATIONS create_activation",
    families__activation="Activation register",
    position="RelativePosition",
    selection="SELECTIONS create_selection",
    selections__rule="Selection register_selection AllKernels",
    selections__window="WindowKernels",
    selections__projected="ProjectedKernels",
    selections__neighborhood="NeighborhoodKernels",
    selections__topk="TopKernels",
    attention="DynamicConvAttention",
    depthwise="DepthwiseSelfAttention",
    dconv="DynamicConv2d",
    dynconv="DynamicDepthwiseConv2d Involution2d",
    kxk="KernelAttention2d",
    strided="StridedAttention",
)
