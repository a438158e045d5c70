"""Attention and depth-wise attention, the definitions and the fast evaluations, against loops in NumPy."""

import numpy as np
import pytest
import torch

import numpy_reference as ref
from reference_checks import *
from vitdynconv.fast import dispatch, tiled
from vitdynconv.fast.relative_position import (
    position_by_convolution,
    position_by_fft,
    position_by_fourier,
    position_by_matrix,
)
from vitdynconv.layers.depthwise import depthwise_attention
from vitdynconv.layers.equivalence import attention, attention_as_convs
from vitdynconv.layers.position import RelativePosition, table_to_bias

# What in the fast evaluations decides by size, with values that send small inputs the large ones' way;
# and the evaluations of the position term. A name that is gone fails here, it is not skipped.
THRESHOLDS = [(tiled, "TILE", 2**9), (tiled, "STORED", 0), (dispatch, "STORED", 0)]
POSITION_WAYS = [
    (position_by_matrix, "head"),
    (position_by_matrix, "channel"),
    (position_by_fourier, "head"),
    (position_by_fft, "head"),
    (position_by_fft, "channel"),
    (position_by_convolution, "head"),
    (position_by_convolution, "channel"),
]
HALF_UNITS = 1  # units in the last place that a half-precision result may be off
WAYS = ("definition", "convolutions", "fast", "fast_large")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """One way to compute attention; "fast_large" sends small inputs the ways of large ones."""
    if request.param == "definition":
        return attention
    if request.param == "convolutions":
        return attention_as_convs
    if request.param == "fast_large":
        for module, name, value in THRESHOLDS:
            monkeypatch.setattr(module, name, value)
    return dispatch.dynamic_conv_attention


# The bias as a matrix, a table or both; and the number of class tokens, which tables know about.
POSITIONS = [("none", 0), ("matrix", 0), ("table", 0), ("table", 1), ("both", 1)]


def position_inputs(kind, grid, prefix, tables):
    """The inputs `bias` (tables, n, n) and `table` (offsets, tables) of a case."""
    n = grid[0] * grid[1] + prefix
    entries = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    inputs = {}
    if kind in ("matrix", "both"):
        inputs["bias"] = random(tables, n, n, seed=5)
    if kind in ("table", "both"):
        inputs["table"] = random(entries, tables, seed=9)
    return inputs


def position_of(table, grid, prefix):
    """The library's table with its grid."""
    return None if table is None else RelativePosition(table, grid, prefix)


def whole_bias(bias, table, grid, prefix):
    """The reference's sum of the bias matrix and that of the table."""
    if table is None:
        return bias
    of_table = ref.relative_bias(table, grid, prefix)
    return of_table if bias is None else bias + of_table


def check_attention(way, name, options, position, mask, grid, prefix, head_dim=DIM, batch=BATCH):
    n = grid[0] * grid[1] + prefix
    chosen = make_mask(mask, batch, HEADS, n, n)
    act = make_activation(name, options, n, head_dim)
    shape = (batch, HEADS, n, head_dim)
    inputs = {name: random(*shape, seed=i, size=1.5) for i, name in enumerate("qkv")}
    inputs |= position_inputs(position, grid, prefix, HEADS)

    def ours(q, k, v, bias=None, table=None):
        place = position_of(table, grid, prefix)
        return way(q, k, v, act, bias=bias, mask=as_tensor(chosen), position=place)

    def reference(**arrays):
        arrays, parameters = split(arrays)
        weights_of = judge(name, options, head_dim, **parameters)
        bias = whole_bias(arrays.get("bias"), arrays.get("table"), grid, prefix)
        return ref.attention(*[arrays[key] for key in "qkv"], weights_of, bias, chosen)

    case = name, str(options), position, mask, grid, prefix, head_dim, batch
    check(ours, reference, inputs, parameters_of(act), case=case)


@pytest.mark.parametrize("position, prefix", POSITIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_attention(way, name, position, mask, prefix):
    check_attention(way, name, {}, position, mask, GRID, prefix)


@pytest.mark.parametrize("mask", ["none", "images"])
@pytest.mark.parametrize("name, options", SETTINGS, ids=SETTING_NAMES)
def test_attention_with_options(way, name, options, mask):
    check_attention(way, name, options, "none", mask, GRID, 0)


@pytest.mark.parametrize("position", ["none", "table"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("way", ["fast", "fast_large"], indirect=True)
def test_attention_of_wide_heads(way, name, position):
    """Heads so wide that computing the logits is the shorter way."""
    check_attention(way, name, {}, position, "none", (1, 3), 0, head_dim=16)


@pytest.mark.parametrize("mask", ["none", "images"])
@pytest.mark.parametrize("position", ["none", "table"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("way", ["fast_large"], indirect=True)
def test_attention_in_several_tiles(way, name, position, mask):
    """Tiles have 64 rows at least: 145 tokens make three of unequal size."""
    check_attention(way, name, {}, position, mask, (12, 12), 1, batch=1)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_attention_with_other_axes_and_banks(way, name, lead):
    """No, one or two axes in front of the heads, and a bank of another size than the map."""
    n, m = 5, 9
    act = make_activation(name, {}, m)
    inputs = {
        "q": random(*lead, HEADS, n, DIM, size=1.5),
        "k": random(*lead, HEADS, m, DIM, seed=1, size=1.5),
        "v": random(*lead, HEADS, m, DIM, seed=2),
        "bias": random(HEADS, n, m, seed=3),
    }
    mask = make_mask("plane", 1, HEADS, n, m)

    def reference(**arrays):
        arrays, parameters = split(arrays)
        three = [arrays[key].reshape(-1, *arrays[key].shape[-3:]) for key in "qkv"]
        y = ref.attention(*three, judge(name, {}, DIM, **parameters), arrays["bias"], mask)
        return y.reshape(*lead, HEADS, n, DIM)

    def ours(q, k, v, bias):
        return way(q, k, v, act, bias=bias, mask=as_tensor(mask))

    check(ours, reference, inputs, parameters_of(act), case=("other axes", name, lead))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_image_without_kernels_gives_zero_and_leaves_the_others_alone(name, way):
    n = 6
    act = make_activation(name, {}, n)
    three = [torch.from_numpy(random(2, HEADS, n, DIM, seed=i)) for i in range(3)]
    q, k, v = [t.requires_grad_() for t in three]
    mask = torch.ones(2, 1, n, n, dtype=torch.bool)
    mask[0] = False
    bias = torch.from_numpy(random(HEADS, n, n))
    y = way(q, k, v, act, bias=bias, mask=mask)
    alone = way(q[1:], k[1:], v[1:], act, bias=bias, mask=mask[1:])
    assert not y[0].any()
    torch.testing.assert_close(y[1:], alone, rtol=TOL, atol=TOL)
    for grad in torch.autograd.grad(y.sum(), [q, k, v]):
        assert not grad[0].any() and grad.isfinite().all()


@pytest.mark.parametrize("dtype, unit", [(torch.half, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("name", ["ln", "ln_relu"])
@pytest.mark.parametrize("way", ["fast_large"], indirect=True)
def test_fast_layernorm_of_half_precision_is_taken_in_float32(way, name, dtype, unit):
    """Keys with a large common mean, which the closed form takes off before it squares."""
    act = make_activation(name, dict(elementwise_affine=False), 60, 8)
    three = [random(2, HEADS, 60, 8), 4 + random(2, HEADS, 60, 8, seed=1), random(2, HEADS, 60, 8)]
    q, k, v = [torch.from_numpy(a).to(dtype) for a in three]
    y = way(q, k, v, act)
    rounded = [t.double().numpy() for t in (q, k, v)]
    expected = ref.attention(*rounded, judge(name, {}, 8))
    assert y.dtype == dtype
    worst = np.abs(y.double().numpy() - expected).max()
    assert worst < HALF_UNITS * unit * np.abs(expected).max()


@pytest.mark.parametrize("term, tables", POSITION_WAYS)
@pytest.mark.parametrize("grid", [(3, 4), (5, 2), (1, 6)])
def test_evaluations_of_the_position_term(term, grid, tables):
    n = grid[0] * grid[1]
    count = HEADS * (DIM if tables == "channel" else 1)
    inputs = {
        "v": random(BATCH, HEADS, n, DIM),
        "table": random((2 * grid[0] - 1) * (2 * grid[1] - 1), count, seed=1),
    }

    def reference(v, table):
        bias = ref.relative_bias(table, grid)
        zero = np.zeros((BATCH, HEADS, n, DIM))
        if tables == "channel":  # Eq. 5 without its first term
            return ref.depthwise_attention(zero, v, bias)
        return np.stack([np.stack([bias[i] @ image[i] for i in range(HEADS)]) for image in v])

    check(lambda v, table: term(v, table, grid), reference, inputs)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 5), (2, 2)])
def test_table_to_bias(grid, prefix):
    table = random((2 * grid[0] - 1) * (2 * grid[1] - 1), 3)
    check(
        lambda table: table_to_bias(table, grid, prefix),
        lambda table: ref.relative_bias(table, grid, prefix),
        {"table": table},
    )


@pytest.mark.parametrize("position, prefix", POSITIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tables", ["head", "channel"])
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_depthwise_attention(evaluation, tables, position, mask, prefix):
    check_depthwise_attention(evaluation, GRID, tables, position, mask, prefix)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("mask", ["none", "images", "empty"])
@pytest.mark.parametrize("position", ["none", "table"])
@pytest.mark.parametrize("tables", ["head", "channel"])
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_depthwise_attention_on_a_larger_map(evaluation, tables, position, mask, prefix):
    check_depthwise_attention(evaluation, (9, 8), tables, position, mask, prefix)


def check_depthwise_attention(evaluation, grid, tables, position, mask, prefix):
    n = grid[0] * grid[1] + prefix
    way = depthwise_attention if evaluation == "definition" else dispatch.fast_depthwise_attention
    chosen = make_mask(mask, BATCH, HEADS, n, n)
    count = HEADS * (DIM if tables == "channel" else 1)
    inputs = {name: random(BATCH, HEADS, n, DIM, seed=i) for i, name in enumerate("qk")}
    inputs |= position_inputs(position, grid, prefix, count)

    def ours(q, k, bias=None, table=None):
        place = position_of(table, grid, prefix)
        return way(q, k, bias=bias, mask=as_tensor(chosen), position=place)

    def reference(q, k, bias=None, table=None):
        return ref.depthwise_attention(q, k, whole_bias(bias, table, grid, prefix), chosen)

    check(ours, reference, inputs, case=("depth-wise", grid, tables, position, mask, prefix))
