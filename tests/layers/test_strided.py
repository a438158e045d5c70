"Strided self-attention: stride 1 is the unstrided module, stride s is that module subsampled; and NumPy, query by query."
import copy
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

import numpy_reference as ref
import reference_checks as checks
from vitdynconv.fast import accelerate, dynamic_conv_attention
from vitdynconv.framework import reference as numpy_mixers
from vitdynconv.framework.beyond import kernels_with_taps, taps_at
from vitdynconv.layers.activations import ACTIVATIONS
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.layers.selection import SELECTIONS
from vitdynconv.layers.depthwise import DepthwiseSelfAttention
from vitdynconv.layers.strided import StridedAttention, StridedDepthwise, coarse_grid, strided_rows

GRID = (5, 4)


def kept(grid, stride, prefix):
    "Tokens that stay, by loops."
    rows = range(0, grid[0], stride)
    columns = range(0, grid[1], stride)
    return [*range(prefix), *[prefix + r * grid[1] + c for r in rows for c in columns]]


def strided(name="softmax", stride=2, prefix=0, **settings):
    settings = dict(pos="rel", grid_size=GRID) | settings
    return checks.prepared(StridedAttention(6, 2, stride, activation=name, num_prefix_tokens=prefix, **settings))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("fast", [False, True])
def test_against_numpy(name, stride, prefix, fast):
    settings = dict(backend=dynamic_conv_attention) if fast else {}
    module = strided(name, stride, prefix, out_dim=10, **settings)
    rows = kept(GRID, stride, prefix)

    def reference(x, state):
        return ref.attention_mixer(x, state, 2, checks.reference_of(name), None, GRID, prefix)[:, rows]

    checks.check_module(module, reference, x=checks.random(2, prefix + math.prod(GRID), 6))


@pytest.mark.parametrize("settings", [dict(), dict(kernel_size=3), dict(selection="neighborhood", activation="ln"), dict(selection="projected", pos=None)])
def test_stride_one_is_the_unstrided_module(settings):
    settings = dict(pos="rel", grid_size=GRID) | settings
    full = checks.prepared(DynamicConvAttention(6, 2, **settings))
    ours = StridedAttention(6, 2, 1, **settings).double()
    ours.load_state_dict(full.state_dict())
    x = torch.from_numpy(checks.random(2, 20, 6))
    assert torch.equal(ours(x), full(x))


@pytest.mark.parametrize("pos", [None, "rel"])
@pytest.mark.parametrize("size, stride", [(3, 2), (5, 2), (3, 3)])
def test_large_kernels_with_a_stride_by_loops(size, stride, pos):
    "Queries are read around the positions that stay; the second convolution slides over the coarse map."
    coarse = tuple(coarse_grid(GRID, stride))

    def reference(x, state):
        q, K, V = kernels_with_taps(x, state, 2, 2, size)
        bias = numpy_mixers.bias_of(state, GRID, 0)
        weights = []
        for i in kept(GRID, stride, 0):
            logits = sum(np.einsum("bhd,bhmd->bhm", q[:, :, p], K[:, :, :, t]) for t, p in taps_at(i, GRID, 0, size)) / 3 ** .5
            if bias is not None: logits = logits + bias[:, i]
            weights.append(np.exp(logits) / np.exp(logits).sum(2, keepdims=True))
        rows = []
        for i in range(math.prod(coarse)):
            rows.append(sum(np.einsum("bhm,bhmd->bhd", weights[p], V[:, :, :, t]) for t, p in taps_at(i, coarse, 0, size)))
        return numpy_mixers.linear(numpy_mixers.join_heads(np.stack(rows, 2)), state, "proj")

    module = strided(stride=stride, kernel_size=size, pos=pos, out_dim=10)
    checks.check_module(module, reference, x=checks.random(2, math.prod(GRID), 6))


@pytest.mark.parametrize("rule", SELECTIONS)
@pytest.mark.parametrize("kind", ["none", "plane", "additive", "causal"])
@pytest.mark.parametrize("cls, whole", [(StridedAttention, DynamicConvAttention), (StridedDepthwise, DepthwiseSelfAttention)], ids=["pair", "depthwise"])
@pytest.mark.parametrize("fast", [False, True])
def test_masks_and_selections_are_of_the_fine_map(rule, kind, cls, whole, fast):
    soft = not SELECTIONS[rule].hard
    if soft and kind != "none": pytest.skip("a soft selection takes no mask")
    settings = dict(pos=None if soft else "rel", grid_size=GRID, selection=rule)
    full = checks.prepared(whole(6, 2, **settings))
    ours = cls(6, 2, 2, **settings).double()
    ours.load_state_dict(full.state_dict())
    if fast: accelerate(ours)
    mask = torch.from_numpy(np.random.default_rng(2).random((20, 20)) < .6)
    call = dict(none={}, plane=dict(mask=mask), causal=dict(is_causal=True),
                additive=dict(mask=torch.zeros(20, 20, dtype=torch.float64).masked_fill(~mask, -100.)))[kind]
    x = torch.from_numpy(checks.random(2, 20, 6))
    torch.testing.assert_close(ours(x, **call), full(x, **call)[:, kept(GRID, 2, 0)], rtol=0, atol=1e-12 if fast else 1e-13)


@pytest.mark.parametrize("rule", [None, *(name for name, rule in SELECTIONS.items() if rule.hard)])
@pytest.mark.parametrize("cls", [DynamicConvAttention, DepthwiseSelfAttention, StridedAttention, StridedDepthwise], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("fast", [False, True])
def test_an_image_of_padding_selects_nothing(rule, cls, kernel_size, fast):
    "Nothing but the output's bias, no gradient, and the other image as if it were alone."
    if cls is StridedAttention and kernel_size > 1: pytest.skip("kernels of k x k with a stride take no mask")
    steps = dict(stride=2) if "Strided" in cls.__name__ else {}
    module = checks.prepared(cls(6, 2, pos="rel", grid_size=GRID, selection=rule, kernel_size=kernel_size, **steps))
    if fast: accelerate(module)
    x = torch.from_numpy(checks.random(2, 20, 6)).requires_grad_()
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    mask[0], mask[1, :, :, 3] = False, False
    y = module(x, mask=mask)
    grad, = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y[0], module.proj.bias.expand_as(y[0]), rtol=0, atol=1e-14)
    assert not grad[0].any() and grad[1].any()
    torch.testing.assert_close(y[1:], module(x[1:], mask=mask[1:]), rtol=0, atol=1e-13)


def test_live_grid_and_out_grid():
    module = strided(pos=None)
    assert module.out_grid == (3, 2) == coarse_grid(GRID, 2)
    module.live_grid = 7, 6
    x = torch.from_numpy(checks.random(2, 42, 6))
    assert module.out_grid == (4, 3) and module(x).shape == (2, 12, 6)
    full = checks.prepared(DynamicConvAttention(6, 2, grid_size=(7, 6)))
    full.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), full(x)[:, kept((7, 6), 2, 0)], rtol=0, atol=1e-13)


@pytest.mark.parametrize("fast", [False, True])
def test_numbers_added_to_logits_come_with_the_table(fast):
    "A mask of numbers is a bias of the call; a learned table is another, and neither replaces the other."
    full = checks.prepared(DynamicConvAttention(6, 2, pos="rel", grid_size=GRID))
    ours = StridedAttention(6, 2, 2, pos="rel", grid_size=GRID).double()
    ours.load_state_dict(full.state_dict())
    if fast: accelerate(ours)
    x, numbers = torch.from_numpy(checks.random(2, 20, 6)), torch.from_numpy(checks.random(20, 20))
    torch.testing.assert_close(ours(x, mask=numbers), full(x, mask=numbers)[:, kept(GRID, 2, 0)], rtol=0, atol=1e-12)


def test_rows_by_loops():
    x = torch.arange(22.)[:, None]
    for stride in 1, 2, 3, 9: assert strided_rows(x, GRID, stride, 2).flatten().tolist() == kept(GRID, stride, 2)


def test_tools_and_batches():
    module, x = strided().float(), torch.randn(2, 20, 6)
    for other in copy.deepcopy(module), pickle.loads(pickle.dumps(module)): assert torch.equal(other(x), module(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},)).module()
    more = torch.randn(5, 20, 6)
    for graph in traced, exported: torch.testing.assert_close(graph(more), module(more), rtol=1e-4, atol=1e-5)
    assert module(x[:0]).shape == (0, 6, 6)
    half = copy.deepcopy(module).half()(x.half()).float()
    assert (half - module(x)).norm() < .05 * module(x).norm()
    assert module.to("meta")(x.to("meta")).shape == (2, 6, 6)


def test_gradients_by_finite_differences():
    module = strided("scaling", kernel_size=3)
    assert torch.autograd.gradcheck(module, torch.from_numpy(checks.random(1, 20, 6)).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("wrong, words", [
    (lambda: StridedAttention(6, 2, 0, grid_size=4), "stride=0"),
    (lambda: StridedAttention(6, 2, 1.5, grid_size=4), "stride=1.5"),
    (lambda: StridedAttention(6, 2, True, grid_size=4), "stride=True"),
    (lambda: StridedAttention(6, 2), "needs grid_size"),
    (lambda: strided(kernel_size=3)(torch.zeros(1, 20, 6, dtype=torch.float64), is_causal=True), "take no mask"),
])
def test_wrong_settings_are_answered(wrong, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error: wrong()
    assert "\n" not in str(error.value)
