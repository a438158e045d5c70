"Convolutions, the equivalence and the position table, over shapes drawn by hypothesis."
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch.nn import functional as F

from vitdynconv.layers.conv import dynamic_conv, dynamic_conv_grouped, static_conv, to_map, to_tokens
from vitdynconv.layers.equivalence import DynamicConvBlock, attention, attention_as_convs, attention_to_convs, convs_to_attention
from vitdynconv.layers.position import RelativePosition, kernel_to_table, resize_per_kernel, resize_table, table_to_bias, table_to_kernel
from vitdynconv.tools.testing import assert_equal, difference

few = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(1, 6)


def normal(*shape, seed=0): return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@few
@given(b=small, d=small, m=small, h=small, w=small)
def test_dynamic_conv_is_a_grouped_convolution(b, d, m, h, w):
    assert max(difference(dynamic_conv, dynamic_conv_grouped, normal(b, d, h, w), normal(b, m, d, seed=1))) < 1e-12


@few
@given(b=st.integers(0, 3), d=small, m=small, h=small, w=small)
def test_static_conv_is_a_linear_layer(b, d, m, h, w):
    x, weight, bias = normal(b, d, h, w), normal(m, d, seed=1), normal(m, seed=2)
    assert_equal(to_tokens(static_conv(x, weight, bias)), F.linear(to_tokens(x), weight, bias))
    assert torch.equal(to_map(to_tokens(x), h, w), x)


def test_an_empty_batch():
    x, kernels = torch.zeros(0, 3, 4, 5, requires_grad=True), torch.zeros(0, 2, 3, requires_grad=True)
    for f in (dynamic_conv, dynamic_conv_grouped):
        y = f(x, kernels)
        assert y.shape == (0, 2, 4, 5)
        y.sum().backward()
    assert DynamicConvBlock(8, 2)(torch.zeros(0, 8, 3, 4)).shape == (0, 8, 3, 4)


def test_worked_example():
    "The three tokens of the page: the third query resembles nothing and receives the mean of all values."
    q, k, v = torch.tensor([[1., 0.], [0., 1.], [0., 0.]]), torch.tensor([[4., 0.], [0., 4.], [0., 0.]]), torch.tensor([[1., 0.], [0., 1.], [9., 9.]])
    for f in (attention, attention_as_convs):
        y = f(q[None], k[None], v[None])[0]
        assert_equal(y[2], v.mean(0), tol=1e-6)
        assert_equal(y[0], y[1].flip(0), tol=1e-6)


@few
@given(h=small, w=small, heads=small, d=small, prefix=st.integers(0, 3))
def test_the_bias_is_a_depthwise_convolution(h, w, heads, d, prefix):
    table, v = normal((2 * h - 1) * (2 * w - 1), heads), normal(2, heads, prefix + h * w, d, seed=1)

    def convolution(table, v):
        maps = v[:, :, prefix:].mT.reshape(2, heads * d, h, w)
        kernel = table_to_kernel(table, (h, w)).repeat_interleave(d, 0)[:, None]
        y = F.conv2d(maps, kernel, padding=(h - 1, w - 1), groups=heads * d).reshape(2, heads, d, h * w).mT
        return F.pad(y, (0, 0, prefix, 0))

    assert max(difference(lambda t, v: table_to_bias(t, (h, w), prefix) @ v, convolution, table, v)) < 1e-12
    assert torch.equal(kernel_to_table(table_to_kernel(table, (h, w))), table)
    bias, rows = table_to_bias(table, (h, w)), table.reshape(2 * h - 1, 2 * w - 1, heads)
    for i, j in product(range(h * w), range(h * w)): assert torch.equal(bias[:, i, j], rows[i // w - j // w + h - 1, i % w - j % w + w - 1])


@pytest.mark.parametrize('window', [(4, 4), (3, 5)])
def test_timm_bias_before_and_after_a_resize(window):
    theirs = WindowAttention(8, 2, window_size=window)
    ours = RelativePosition(theirs.relative_position_bias_table.detach().clone(), window)
    assert torch.equal(ours.bias(), theirs._get_rel_pos_bias()[0])
    theirs.set_window_size((6, 7))
    assert torch.equal(ours.resized((6, 7)).bias(), theirs._get_rel_pos_bias()[0])
    assert ours.resized(window).table is ours.table


@few
@given(old=st.tuples(small, small), new=st.tuples(small, small), prefix=st.integers(0, 2), more=st.sampled_from([(), (3,)]))
def test_per_kernel_weights_keep_constants_and_prefixes(old, new, prefix, more):
    weight = normal(prefix + old[0] * old[1], *more)
    moved = resize_per_kernel(weight, old, new, prefix)
    assert moved.shape == (prefix + new[0] * new[1], *more) and torch.equal(moved[:prefix], weight[:prefix])
    constant = resize_per_kernel(torch.full_like(weight, 3.), old, new, prefix)
    assert_equal(constant, torch.full_like(moved, 3.), tol=1e-6)
    if old == new: assert torch.equal(moved, weight)
    elif more: assert_equal(moved[:, 1], resize_per_kernel(weight[:, 1], old, new, prefix), tol=1e-6)


@pytest.mark.parametrize('attend', [attention, attention_as_convs])
def test_a_table_is_the_bias_it_makes(attend):
    q, k, v = [normal(2, 3, 7, 4, seed=s) for s in range(3)]
    position, bias = RelativePosition(normal(15, 3), (2, 3), 1), normal(3, 7, 7, seed=4)
    for name in ('softmax', 'scaling_relu', 'sigmoid'):
        assert torch.equal(attend(q, k, v, name, position=position), attend(q, k, v, name, position.bias()))
        assert torch.equal(attend(q, k, v, name, bias, position=position), attend(q, k, v, name, bias + position.bias()))


@pytest.mark.parametrize('layout', ['timm', 'torch'])
@pytest.mark.parametrize('bias', [True, False])
def test_weights_there_and_back(layout, bias):
    m = Attention(12, 3, qkv_bias=bias, proj_bias=bias) if layout == 'timm' else nn.MultiheadAttention(12, 3, bias=bias)
    back = convs_to_attention(attention_to_convs(m.state_dict()), layout)
    assert back.keys() == m.state_dict().keys() and all(torch.equal(back[k], w) for k, w in m.state_dict().items())


q, k = normal(1, 2, 3, 4), normal(1, 2, 5, 4)

@pytest.mark.parametrize('wrong, words', [
    (lambda: to_map(torch.zeros(1, 6, 2), 2, 4), ['6 tokens', '2 x 4']),
    (lambda: attention(q, k, k, mask=torch.ones(3, 4).bool()), ['mask', '(3, 4)', '(1, 2, 3, 5)']),
    (lambda: attention(q, k, k, bias=normal(3, 3, 5)), ['bias', '(3, 3, 5)']),
    (lambda: attention(q, k, k, mask=torch.ones(3, 5)), ['float32', 'bool']),
    (lambda: attention(q, k[..., :3], k[..., :3]), ['4 channels', 'keys 3']),
    (lambda: attention(q, k, k[:, :, 1:]), ['same number of kernels']),
    (lambda: attention(q, k, k, position=RelativePosition(normal(15, 2), (2, 3))), ['(2, 6, 6)', '(1, 2, 3, 5)']),
    (lambda: kernel_to_table(torch.zeros(1, 4, 3)), ['4 x 3', 'odd']),
    (lambda: resize_table(torch.zeros(9, 1), (3, 3), (4, 4)), ['9 entries', '3 x 3', '25']),
    (lambda: attention_to_convs({'weight': q}), ['weight', 'qkv.weight', 'in_proj_weight']),
    (lambda: convs_to_attention({}, 'jax'), ["'jax'", 'timm']),
    (lambda: DynamicConvBlock(10, 3), ['3 heads', 'dim=10']),
])
def test_bad_input_is_named(wrong, words):
    with pytest.raises(ValueError) as e: wrong()
    for word in words: assert word in str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.half, torch.bfloat16], ids=str)
def test_per_kernel_weights_are_resized_in_their_own_precision(dtype):
    "float64 must not pass through float32; half precision, which the interpolation lacks on a CPU, must not stay there."
    thirds = torch.full((10,), 1 / 3, dtype=dtype)
    assert_equal(resize_per_kernel(thirds, (3, 3), (5, 2), 1), thirds[:1].expand(11), tol=4 * torch.finfo(dtype).eps)
