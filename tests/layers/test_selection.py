"Rules of kernel selection, against timm and against loops, over shapes drawn by hypothesis."
import copy
import math
import pickle

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from vitdynconv.layers.activations import ACTIVATIONS, create_activation
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.layers.conv import to_map, to_tokens
from vitdynconv.tools.testing import assert_equal, difference
from vitdynconv.layers.dynconv import KernelAttention2d
from vitdynconv.layers.equivalence import attention, attention_to_convs, convs_to_attention
from vitdynconv.layers.selection import SHARING, AllKernels, ProjectedKernels, WindowKernels, projections

few = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(3, 11), st.integers(3, 11))
windows = st.tuples(st.integers(2, 5), st.integers(2, 5)).flatmap(
    lambda w: st.tuples(st.just(w), st.tuples(st.integers(0, w[0] - 1), st.integers(0, w[1] - 1))))


def normal(*shape, seed=0): return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@few
@given(size=sizes, rule=windows, b=st.integers(1, 3))
def test_reverse_undoes_partition(size, rule, b):
    x = normal(b, *size, 2)
    rule = WindowKernels(*rule)
    assert torch.equal(rule.reverse(rule.partition(x), *size), x)
    assert torch.equal(AllKernels().reverse(AllKernels().partition(x), *size), x)


@few
@given(size=sizes, rule=windows)
def test_mask_is_what_the_windows_say(size, rule):
    "The literal mask from positions, against the mask of the windows, carried back through partition."
    (h, w), rule = size, WindowKernels(*rule)
    mask, n = rule.mask(h, w), h * w
    ids = rule.partition(torch.arange(1, n + 1).reshape(1, h, w, 1)).squeeze(-1)                 # 0 is padding
    inside = rule.window_mask(h, w)
    area = math.prod(rule.window_size)
    inside = torch.ones(len(ids), area, area, dtype=torch.bool) if inside is None else inside
    found = torch.zeros(n, n, dtype=torch.bool)
    padding = torch.zeros(n, dtype=torch.long)
    for window, allowed in zip(ids, inside):
        for a in range(area):
            if window[a] == 0: continue
            padding[window[a] - 1] = (allowed[a] & (window == 0)).sum()
            found[window[a] - 1, window[allowed[a] & (window > 0)] - 1] = True
    assert torch.equal(mask[:, :n], found)
    assert torch.equal(mask[:, n:].sum(1), padding)


@few
@given(size=sizes, window=st.integers(2, 5), shifted=st.booleans(), heads=st.sampled_from([1, 2]))
def test_swin_block_is_a_mask_over_the_map(size, window, shifted, heads):
    h, w = size
    block = SwinTransformerBlock(8, size, heads, window_size=window, shift_size=window // 2 if shifted else 0).double()
    for p in block.parameters(): nn.init.normal_(p, std=.3)
    rule, a = WindowKernels.from_timm(block), block.attn
    assert repr(WindowKernels(window, window // 2 if shifted else 0).fit(h, w)) == repr(rule)

    def masked(x):
        mask = rule.mask(h, w)
        q, k, v = a.qkv(F.pad(x.flatten(1, 2), (0, 0, 0, mask.shape[1] - h * w))).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = attention(q[:, :, :h * w], k, v, bias=rule.spread(a._get_rel_pos_bias()[0], h, w), mask=mask)
        return a.proj(y.transpose(1, 2).flatten(2)).unflatten(1, size)

    assert max(difference(block._attn, masked, normal(2, h, w, 8), params=[(p, p) for p in a.parameters()])) < 1e-12


@pytest.mark.parametrize('size', [(56, 56), (40, 64)])
@pytest.mark.parametrize('shift', [0, 3])
def test_first_stage_of_swin_at_real_sizes(size, shift):
    "A block of Swin's first stage at 224 and at a non-square size that windows of 7 do not tile."
    block = SwinTransformerBlock(6, size, 1, window_size=7, shift_size=shift).double()
    for p in block.parameters(): nn.init.normal_(p, std=.3)
    rule, a, x, (h, w) = WindowKernels.from_timm(block), block.attn, normal(1, *size, 6), size
    mask = rule.mask(h, w)
    q, k, v = a.qkv(F.pad(x.flatten(1, 2), (0, 0, 0, mask.shape[1] - h * w))).unflatten(2, (3, 1, -1)).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        y = attention(q[:, :, :h * w], k, v, bias=rule.spread(a._get_rel_pos_bias()[0], h, w), mask=mask)
        assert_equal(a.proj(y.transpose(1, 2).flatten(2)).unflatten(1, size), block._attn(x))


@few
@given(name=st.sampled_from(list(ACTIVATIONS)), size=sizes, rule=windows)
def test_other_windows_have_exactly_no_influence(name, size, rule):
    (h, w), rule = size, WindowKernels(*rule)
    act = create_activation(name, num_kernels=math.prod(rule.window_size), head_dim=4).double()

    def run(q, k, v):
        q, k, v = [rule.partition(t).unflatten(0, (len(t), -1)) for t in (q, k, v)]
        return rule.reverse(attention(q, k, v, act, mask=rule.window_mask(h, w)).flatten(0, 1), h, w)

    q, k, v = normal(3, 1, h, w, 4)
    k2, v2, seen = k.clone(), v.clone(), rule.mask(h, w)[0, :h * w].reshape(h, w)
    k2[:, ~seen], v2[:, ~seen] = 1e4, -1e4
    assert torch.equal(run(q, k2, v2)[0, 0, 0], run(q, k, v)[0, 0, 0])
    v.requires_grad_()
    grad, = torch.autograd.grad(run(q, k, v)[0, 0, 0].sum(), v)
    assert not grad[:, ~seen].any()


@few
@given(share=st.sampled_from(SHARING), grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), heads=st.integers(1, 3), short=st.integers(0, 3), data=st.data())
def test_projected_kernels_are_mixtures(share, grid, heads, short, data):
    n = math.prod(grid)
    k_new = data.draw(st.integers(1, n))
    rule = ProjectedKernels(grid, k_new, heads, share).double()
    m = max(1, n - short) if grid[0] == 1 else n   # a shorter sequence uses the first rows; a smaller map would need other ones
    k, v = normal(2, 2, heads, m, 3)
    for made, bank, weight in zip(rule(None, k, v)[:2], (k, v), (rule.E, rule.E if rule.F is None else rule.F)):
        expected = torch.stack([torch.stack([sum(weight[min(head, len(weight) - 1), j, l] * bank[:, head, j] for j in range(m)) for l in range(k_new)], 1) for head in range(heads)], 1)
        assert_equal(made, expected)


def test_linformer_as_convolutions_state_dict_to_state_dict():
    tokens = DynamicConvAttention(12, 3, selection=ProjectedKernels((3, 4), 5, 3)).double()
    convs, x = KernelAttention2d(12, 3, 1, selection=ProjectedKernels((3, 4), 5, 3)).double(), normal(2, 12, 3, 4)
    convs.load_state_dict(attention_to_convs(tokens.state_dict()) | {f'selection.{name}': w for name, w in tokens.selection.state_dict().items()})
    assert_equal(convs(x), to_map(tokens(to_tokens(x)), 3, 4))
    back = DynamicConvAttention(12, 3, selection=ProjectedKernels((3, 4), 5, 3)).double()
    back.load_state_dict(convs_to_attention(convs.state_dict()) | {f'selection.{name}': w for name, w in convs.selection.state_dict().items()})
    assert all(torch.equal(w, tokens.state_dict()[name]) for name, w in back.state_dict().items())


def test_gradients_by_finite_differences():
    rule, soft = WindowKernels(2, 1), ProjectedKernels((3, 4), 2).double()
    x = normal(1, 3, 4, 2).requires_grad_()
    def swin(x):
        windows = rule.partition(x)
        return rule.reverse(attention(windows, windows, windows, 'ln_relu', mask=rule.window_mask(3, 4)), 3, 4)
    assert torch.autograd.gradcheck(swin, x)
    assert torch.autograd.gradcheck(lambda x: attention(x, *soft(x, x, x)[:2]), normal(1, 1, 12, 2).requires_grad_())


def test_sharing_costs_what_it_should():
    count = {share: sum(p.numel() for p in nn.ModuleList(projections(3, 4, 2, num_heads=2, share=share)).parameters()) for share in SHARING}
    assert count == dict(none=3 * 2 * 2 * 32, heads=3 * 2 * 32, kv=3 * 32, layers=32)
    layers = projections(3, 4, 2, share='layers')
    assert layers[0] is layers[2] and copy.deepcopy(nn.ModuleList(layers))[0].E is not layers[0].E


@pytest.mark.parametrize('activation', ['softmax', 'scaling', 'ln_relu'])
def test_linformer_attention_and_its_state_dict(activation):
    make = lambda: DynamicConvAttention(12, 3, activation=activation, num_kernels=5, selection=ProjectedKernels((3, 4), 5, 3, num_prefix_tokens=1)).double()
    ours, other, x = make(), make(), normal(2, 13, 12)
    q, k, v = ours.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    k, v = torch.einsum('hjl,bhjd->bhld', ours.selection.E, k), torch.einsum('hjl,bhjd->bhld', ours.selection.F, v)
    assert_equal(ours(x), ours.proj(attention(q, k, v, ours.act).transpose(1, 2).flatten(2)))
    other.load_state_dict(ours.state_dict())
    assert_equal(other(x), ours(x))
    assert_equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    assert {'selection.E', 'selection.F'} <= ours.state_dict().keys()


@pytest.mark.parametrize('wrong, message', [
    (lambda: WindowKernels(0), 'window_size=0'), (lambda: WindowKernels(4, 4), '0 <= shift < window'), (lambda: WindowKernels(4, -1), '0 <= shift < window'),
    (lambda: ProjectedKernels(4, 2, share='all'), "choose one of \\('none', 'heads', 'kv', 'layers'\\)"), (lambda: ProjectedKernels(2, 5), 'choose 1 to 4'),
    (lambda: ProjectedKernels(2, 3)(None, normal(1, 1, 5, 2), normal(1, 1, 5, 2)), 'set_grid_size'), (lambda: ProjectedKernels(2, 3, 2)(None, normal(1, 3, 4, 2), normal(1, 3, 4, 2)), 'num_heads=3')])
def test_wrong_settings_are_answered(wrong, message):
    with pytest.raises(ValueError, match=message): wrong()
