"The derivation as a user has it: every operator against independent computations, over shapes drawn by hypothesis."
import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import nn

from vitdynconv.layers.activations import ACTIVATIONS, create_activation
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.layers.conv import dynamic_conv, dynamic_conv_grouped
from vitdynconv.tools.testing import assert_equal, difference
from vitdynconv.layers.depthwise import DepthwiseSelfAttention, depthwise_attention
from vitdynconv.layers.equivalence import attention, attention_as_convs, attention_to_convs, convs_to_attention
from vitdynconv.layers.position import RelativePosition, kernel_to_table, table_to_bias, table_to_kernel

few = settings(max_examples=25, deadline=None, derandomize=True)
small, names = st.integers(1, 6), st.sampled_from(list(ACTIVATIONS))


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def normal(*shape, seed=0): return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed=0):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < .6
    mask[..., 0] = True  # nobody selects nothing
    return mask


@few
@given(b=small, d=small, m=small, h=small, w=small)
def test_dynamic_conv_is_a_grouped_convolution(b, d, m, h, w):
    assert max(difference(dynamic_conv, dynamic_conv_grouped, normal(b, d, h, w), normal(b, m, d, seed=1))) < 1e-12


@few
@given(name=names, b=small, h=small, n=small, m=small, d=small, bias=st.booleans(), mask=st.sampled_from([None, 'shared', 'each']))
def test_attention_is_convolutions(name, b, h, n, m, d, bias, mask):
    q, k, v = normal(b, h, n, d), normal(b, h, m, d, seed=1), normal(b, h, m, d, seed=2)
    bias = normal(h, n, m, seed=3) if bias else None
    mask = {None: None, 'shared': random_mask(n, m), 'each': random_mask(b, h, n, m)}[mask]
    act = create_activation(name, num_kernels=m, head_dim=d).double()
    run = lambda f: lambda q, k, v: f(q, k, v, act, bias, mask)
    assert max(difference(run(attention), run(attention_as_convs), q, k, v)) < 1e-12


@few
@given(name=names, b=small, h=small, n=st.integers(2, 6), d=small)
def test_left_out_kernels_are_as_if_they_were_not_there(name, b, h, n, d):
    q, k, v = normal(b, h, 3, d), normal(b, h, n, d, seed=1), normal(b, h, n, d, seed=2)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[:max(1, n // 2)] = True
    assert_equal(attention(q, k, v, name, mask=kept.expand(3, n)), attention(q, k[:, :, kept], v[:, :, kept], name))


@few
@given(name=names, h=small, n=small, d=small)
def test_order_of_kernels_does_not_matter_without_position(name, h, n, d):
    q, k, v = normal(1, h, 4, d), normal(1, h, n, d, seed=1), normal(1, h, n, d, seed=2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert_equal(attention(q, k[:, :, order], v[:, :, order], name), attention(q, k, v, name))


@pytest.mark.parametrize('name', list(ACTIVATIONS))
def test_gradients_of_activations(name):
    act = create_activation(name, num_kernels=5, head_dim=4).double()
    for p in act.parameters(): nn.init.normal_(p)
    logits, bias, mask = normal(2, 3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_(), random_mask(3, 5)
    assert torch.autograd.gradcheck(lambda s, b: act(s, bias=b, mask=mask), (logits, bias))
    assert torch.autograd.gradcheck(act, logits)


@pytest.mark.parametrize('name', list(ACTIVATIONS))
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_half_precision_is_close(name, dtype):
    q, k, v = (normal(1, 1, 64, 32, seed=s).float() for s in range(3))
    exact = attention(q, k, v, name)
    out = attention(q.to(dtype), k.to(dtype), v.to(dtype), name)
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert (out.float() - exact).norm() < (4e-3 if dtype == torch.half else 3e-2) * exact.norm()


@few
@given(h=small, w=small, heads=small, d=small, prefix=st.integers(0, 3))
def test_the_bias_is_a_depthwise_convolution(h, w, heads, d, prefix):
    table, v = normal((2 * h - 1) * (2 * w - 1), heads), normal(2, heads, prefix + h * w, d, seed=1)

    def convolution(table, v):
        maps = v[:, :, prefix:].mT.reshape(2, heads * d, h, w)
        kernel = table_to_kernel(table, (h, w)).repeat_interleave(d, 0)[:, None]
        y = nn.functional.conv2d(maps, kernel, padding=(h - 1, w - 1), groups=heads * d).reshape(2, heads, d, h * w).mT
        return nn.functional.pad(y, (0, 0, prefix, 0))

    assert max(difference(lambda t, v: table_to_bias(t, (h, w), prefix) @ v, convolution, table, v)) < 1e-12
    assert torch.equal(kernel_to_table(table_to_kernel(table, (h, w))), table)


@pytest.mark.parametrize('window', [(4, 4), (3, 5)])
def test_timm_bias_before_and_after_a_resize(window):
    theirs = WindowAttention(8, 2, window_size=window)
    ours = RelativePosition(theirs.relative_position_bias_table.detach().clone(), window)
    assert torch.equal(ours.bias(), theirs._get_rel_pos_bias()[0])
    theirs.set_window_size((6, 7))
    assert torch.equal(ours.resized((6, 7)).bias(), theirs._get_rel_pos_bias()[0])


@pytest.mark.parametrize('layout', ['timm', 'torch'])
@pytest.mark.parametrize('bias', [True, False])
def test_weights_there_and_back(layout, bias):
    m = Attention(12, 3, qkv_bias=bias, proj_bias=bias) if layout == 'timm' else nn.MultiheadAttention(12, 3, bias=bias)
    back = convs_to_attention(attention_to_convs(m.state_dict()), layout)
    assert back.keys() == m.state_dict().keys() and all(torch.equal(back[k], w) for k, w in m.state_dict().items())


@few
@given(heads=st.sampled_from([1, 2, 4]), n=small, b=small, bias=st.booleans(), norm=st.booleans())
def test_drop_in_for_timm_attention(heads, n, b, bias, norm):
    torch.manual_seed(0)
    theirs = Attention(16, heads, qkv_bias=bias, qk_norm=norm, norm_layer=nn.LayerNorm).double()
    ours = DynamicConvAttention.from_timm(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    pairs = list(zip(dict(sorted(ours.named_parameters())).values(), dict(sorted(theirs.named_parameters())).values()))
    assert max(difference(ours, theirs, normal(b, n, 16), params=pairs)) < 1e-12
    mask = random_mask(n, n)
    assert max(difference(lambda x: ours(x, attn_mask=mask), lambda x: theirs(x, attn_mask=mask), normal(b, n, 16))) < 1e-12


@pytest.mark.parametrize('size', [(8, 8), (8, 12)])
def test_drop_in_for_timm_window_attention(size):
    block = SwinTransformerBlock(8, size, 2, window_size=4, shift_size=2).double()
    nn.init.normal_(block.attn.relative_position_bias_table)
    other = copy.deepcopy(block)
    other.attn = DynamicConvAttention.from_timm(block.attn)
    pairs = [(p, dict(other.named_parameters())[name]) for name, p in block.named_parameters()]
    assert max(difference(block, other, normal(2, *size, 8), params=pairs)) < 1e-12


@pytest.mark.parametrize('name', [*ACTIVATIONS, 'depthwise'])
def test_a_masked_region_has_no_influence(name):
    settings = dict(dim=8, num_heads=2, pos='rel', grid_size=(2, 4), num_prefix_tokens=1)
    m = (DepthwiseSelfAttention(**settings) if name == 'depthwise' else DynamicConvAttention(**settings, activation=name)).double()
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[:5, :5] = mask[5:, 5:] = True
    x = normal(2, 9, 8).requires_grad_()
    y = m(x, mask=mask)
    changed = x.detach().clone()
    changed[:, 5:] += 7
    assert torch.equal(m(changed, mask=mask)[:, :5], y[:, :5])
    grad, = torch.autograd.grad(y[:, :5].square().sum(), x)
    assert (grad[:, 5:] == 0).all() and (grad[:, :5] != 0).any()


@few
@given(h=st.integers(1, 3), d=st.integers(1, 3), b=small, n=small, per_channel=st.booleans())
def test_depthwise_is_equation_5(h, d, b, n, per_channel):
    q, k = normal(b, h, n, d), normal(b, h, n, d, seed=1)
    bias, mask = normal(h * d if per_channel else h, n, n, seed=2), random_mask(n, n)
    y = depthwise_attention(q, k, bias, mask)
    for image, head, i, c in [(b - 1, h - 1, n - 1, d - 1), (0, 0, 0, 0)]:
        chosen = mask[i].nonzero().flatten().tolist()
        mean = sum(k[image, head, j, c] for j in chosen) / len(chosen)
        row = bias[head * d + c if per_channel else head, i]
        assert_equal(y[image, head, i, c], q[image, head, i, c] * mean + sum(row[j] * k[image, head, j, c] for j in chosen))


@pytest.mark.parametrize('mixer', [DynamicConvAttention, DepthwiseSelfAttention])
def test_mixers_survive_copies_and_half_precision(mixer):
    m = mixer(8, 2, pos='rel', grid_size=3)
    x = normal(2, 9, 8).float()
    for other in copy.deepcopy(m), pickle.loads(pickle.dumps(m)): assert torch.equal(other(x), m(x))
    assert_equal(copy.deepcopy(m).bfloat16()(x.bfloat16()).float(), m(x), tol=5e-2)


def test_per_kernel_weights_follow_the_grid():
    m = DynamicConvAttention(8, 2, activation='ln', pos='rel', grid_size=3, num_prefix_tokens=1)
    m.set_grid_size((4, 5))
    assert m.act.weight.shape == m.act.bias.shape == (21,) and m(normal(2, 21, 8).float()).isfinite().all()


@pytest.mark.parametrize('wrong, words', [
    (lambda: create_activation('lnrelu'), ['lnrelu', 'scaling_relu', "did you mean 'ln_relu'"]),
    (lambda: create_activation('softmax', head_dim=4, temprature=1), ['temprature']),
    (lambda: create_activation('ln', head_dim=4), ['num_kernels']),
    (lambda: create_activation('scaling'), ['head_dim']),
    (lambda: DynamicConvAttention(10, 3), ['3 heads', 'dim=10']),
    (lambda: DynamicConvAttention(8, 2, pos='relative'), ['relative', "'rel'"]),
    (lambda: DynamicConvAttention(8, 2, pos='rel'), ['grid_size']),
    (lambda: DepthwiseSelfAttention(10, 3), ['3 heads', 'dim=10']),
    (lambda: DepthwiseSelfAttention(8, 2, pos_per='row'), ['row', 'channel']),
    (lambda: attention(normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 4), mask=torch.ones(3, 4).bool()), ['mask', '(3, 4)', '(1, 2, 3, 5)']),
    (lambda: attention(normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 4), bias=normal(3, 3, 5)), ['bias', '(3, 3, 5)']),
    (lambda: attention(normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 4), mask=torch.ones(3, 5)), ['float32', 'bool']),
    (lambda: DynamicConvAttention(8, 2, activation='scaling')(normal(1, 3, 8).float(), mask=torch.full((3, 3), -3.)), ['-3.0', '-100']),
])
def test_bad_input_is_named(wrong, words):
    with pytest.raises(ValueError) as e: wrong()
    for word in words: assert word in str(e.value)
    assert '\n' not in str(e.value)
