"""Dynamic convolutions against NumPy: D-Conv, D-DW-Conv, involution, k x k attention."""

import pytest

import numpy_reference as ref
from reference_checks import *
from vitdynconv.layers.dconv import DynamicConv1d, DynamicConv2d
from vitdynconv.layers.dynconv import DynamicDepthwiseConv1d, DynamicDepthwiseConv2d, GeneratedConv2d, Involution2d
from vitdynconv.layers.kxk import KernelAttention2d
from vitdynconv.layers.selections.window import WindowKernels


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("settings", [
    dict(),
    dict(padding=1),
    dict(stride=2, padding=(2, 1), groups=2),
    dict(stride=(2, 1), dilation=2, padding="valid"),
    dict(padding="same", dilation=(1, 2), bias=False),
    dict(padding=1, num_kernels=3, reduction=2, groups=4),
])
@pytest.mark.parametrize("temperature", [1.0, 30.0, 0.5])
def test_dynamic_conv(settings, temperature, literal):
    conv = DynamicConv2d(8, 12, 3, temperature=temperature, **settings)
    conv = prepared(conv)
    names = ("stride", "padding", "dilation", "groups")
    options = {key: value for key, value in settings.items() if key in names}

    def reference(x, state):
        return ref.dynamic_conv(x, state, temperature, **options)

    if literal:
        conv.forward = conv.literal
    check_module(conv, reference, x=random(3, 8, 6, 7) + 0.3)


def test_dynamic_conv_of_sequences():
    conv = prepared(DynamicConv1d(8, 6, 3, stride=2, padding=1, temperature=2.0))

    def reference(x, state):
        flat = dict(state, weight=state["weight"][:, :, :, None])
        padding = (0, 1)
        return ref.one_dimensional(ref.dynamic_conv, x, flat, 2.0, stride=(1, 2), padding=padding)

    check_module(conv, reference, x=random(3, 8, 9))


@pytest.mark.parametrize("per", ["position", "image"])
@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("settings", [
    dict(),
    dict(stride=2),
    dict(stride=3, groups=2),
    dict(kernel_size=(5, 3), dilation=2),
    dict(reduction=None, stride=2),
    dict(norm_layer=None, bias=False, groups=1),
])
def test_dynamic_depthwise_conv(settings, per, literal):
    settings = dict(kernel_size=3) | settings
    conv = prepared(DynamicDepthwiseConv2d(8, per=per, **settings))
    stride, dilation = settings.get("stride", 1), settings.get("dilation", 1)

    def reference(x, state):
        size = settings["kernel_size"]
        return ref.dynamic_depthwise_conv(x, state, size, per, stride, dilation)

    if literal:
        conv.forward = conv.literal
    check_module(conv, reference, x=random(2, 8, 6, 7))


@pytest.mark.parametrize("per", ["position", "image"])
def test_dynamic_depthwise_conv_of_sequences(per):
    conv = prepared(DynamicDepthwiseConv1d(8, 5, per=per, groups=4))

    def reference(x, state):
        run = ref.dynamic_depthwise_conv
        return ref.one_dimensional(run, x, sequence_state(state), (1, 5), per)

    check_module(conv, reference, x=random(2, 8, 9))


def sequence_state(state):
    """Layers of a generator for sequences as those for maps of one row: the same numbers."""
    return {name: a[..., None] if a.ndim == 3 else a for name, a in state.items()}


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_involution(stride, literal):
    conv = prepared(Involution2d(8, 3, stride, group_channels=4))

    def reference(x, state):
        pool = "block" if stride > 1 else "position"
        return ref.dynamic_depthwise_conv(x, state, 3, pool, stride)

    if literal:
        conv.forward = conv.literal
    check_module(conv, reference, x=random(2, 8, 6, 7))


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("per", ["position", "image"])
def test_generated_conv(per, literal):
    conv = prepared(GeneratedConv2d(4, 3, per))
    if literal:
        conv.forward = conv.literal
    reference = lambda x, state: ref.generated_conv(x, state, 3, per)
    check_module(conv, reference, x=random(2, 4, 3, 5))


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("settings", [
    dict(),
    dict(kernel_size=1),
    dict(stride=2),
    dict(stride=2, pos="rel", grid_size=(3, 4)),
    dict(stride=2, pos="rel", grid_size=(3, 4), kernel_size=1),
    dict(selection=WindowKernels((3, 2)), pos="rel", grid_size=(3, 4)),
])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kernel_attention(name, settings, literal):
    settings = dict(kernel_size=3, stride=1) | settings
    block = prepared(KernelAttention2d(4, 2, activation=name, num_kernels=12, **settings), 0.3)
    mask = None
    if "selection" in settings:
        mask = ref.same_plane_window((3, 4), (3, 2))

    def reference(x, state):
        size, stride = settings["kernel_size"], settings["stride"]
        act = reference_of(name)
        return ref.kernel_attention(x, state, 2, size, stride, act, None, (3, 4), mask)

    if literal:
        block.forward = block.literal
    check_module(block, reference, x=random(2, 4, 3, 4))
