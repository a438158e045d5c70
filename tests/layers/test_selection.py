"Rules of kernel selection, against timm and against loops, over shapes drawn by hypothesis."
import copy
import itertools
import math
import pickle
import re
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import numpy_reference as ref
import reference_checks as checks
from vitdynconv.layers.activations import ACTIVATIONS, create_activation
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.layers.conv import to_map, to_tokens
from vitdynconv.tools.testing import assert_equal, difference
from vitdynconv.layers.kxk import KernelAttention2d
from vitdynconv.layers.equivalence import attention, attention_to_convs, convs_to_attention
from vitdynconv.layers.selection import SELECTIONS, create_selection
from vitdynconv.layers.selections.projected import SHARING, ProjectedKernels, projections
from vitdynconv.layers.selections.rule import AllKernels
from vitdynconv.layers.selections.neighborhood import NeighborhoodKernels
from vitdynconv.layers.selections.topk import TopKernels
from vitdynconv.layers.selections.window import WindowKernels

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


# --- every rule of the registry, in both mixers, against loops that share no code with it -----------------------------

GRID, LIVE, PREFIX = (4, 5), (5, 6), 1
FAMILY = {cls.family: name for name, cls in ACTIVATIONS.items() if name != "softmax"} | {"fused": "softmax"}   # one activation of each family
OPTIONS = dict(window=dict(window_size=(2, 3), shift_size=1), neighborhood=dict(kernel_size=3), topk=dict(k=6), projected=dict(num_kernels=5))
RULES = {name: OPTIONS.get(name, cls.example) for name, cls in SELECTIONS.items()} | {"window, plain": dict(window_size=2), "topk, a share": dict(k=.3)}
MIXERS = [*FAMILY.values(), *checks.DEPTHWISE]
HARD = [rule for rule in RULES if SELECTIONS[rule.split(",")[0]].hard]
rules = pytest.mark.parametrize("rule", RULES)
mixers = pytest.mark.parametrize("mixer", MIXERS)


def build(rule, mixer, grid=GRID, prefix=0, pos=None, **settings):
    "A mixer of 6 channels in two heads, with a selection given by name."
    return checks.make_mixer(mixer, pos, grid, prefix, selection=rule.split(",")[0], selection_options=RULES[rule], **settings)


def on_axis(i, n, size):
    start = min(max(i - size // 2, 0), n - size)
    return range(start, start + size)


def in_neighborhood(i, j, grid, kernel_size):
    (h, w), (r, c) = grid, divmod(i, grid[1])
    return j // w in on_axis(r, h, kernel_size) and j % w in on_axis(c, w, kernel_size)


def in_window(grid, window_size, shift_size=0):
    "Tokens that share a window and a region, from the lists of `numpy_reference`."
    pair = lambda v: (v, v) if isinstance(v, int) else v
    window, shift = pair(window_size), pair(shift_size)
    shared = np.zeros((math.prod(grid),) * 2, bool)
    for tokens, regions in zip(*ref.window_tokens(grid, window, shift)):
        for (a, ra), (b, rb) in itertools.product(zip(tokens, regions), repeat=2):
            if a is None or b is None or ra != rb: continue
            shared[a[0] * grid[1] + a[1], b[0] * grid[1] + b[1]] = True
    return shared


def map_mask(rule, grid):
    "The hard rules of the map, (n, n)."
    n, name = math.prod(grid), rule.split(",")[0]
    if name == "window": return in_window(grid, **RULES[rule])
    if name == "neighborhood": return np.array([[in_neighborhood(i, j, grid, **RULES[rule]) for j in range(n)] for i in range(n)])
    if SELECTIONS[name].looks_at_answers: return np.ones((n, n), bool)
    return create_selection(name, grid, **RULES[rule]).reference(grid)   # a rule that was added later


def best_kernels(q, k, mask, count):
    "The `count` largest answers among those of `mask`; of equal ones the first."
    b, h, n, m = *q.shape[:3], k.shape[2]
    chosen = np.zeros((b, h, n, m), bool)
    for image, head, i in itertools.product(range(b), range(h), range(n)):
        allowed = [j for j in range(m) if mask[image, head, i, j]]
        allowed.sort(key=lambda j: (-(q[image, head, i] * k[image, head, j]).real.sum(), j))
        chosen[image, head, i, allowed[:count]] = True
    return chosen


def literal_mask(rule, x, state, grid, prefix, mask):
    "What a hard rule leaves of a mask, (b, h, n, n)."
    n = prefix + math.prod(grid)
    chosen = np.ones((n, n), bool)
    chosen[prefix:, prefix:] = map_mask(rule, grid)
    shape = len(x), 2, n, n
    chosen = np.broadcast_to(chosen if mask is None else chosen & mask, shape)
    if rule.split(",")[0] != "topk": return chosen
    layer, parts = ("qkv", 3) if "qkv.weight" in state else ("qk", 2)
    q, k = ref.heads_of(ref.linear(x, state, layer), parts, 2)[:2]
    wanted = RULES[rule]["k"]
    return best_kernels(q, k, chosen, wanted if isinstance(wanted, int) else int(wanted * n + .5))


def literal(rule, mixer, grid=GRID, prefix=0, mask=None):
    "What `build(...)` should compute: (x, state) -> output."
    def run(x, state):
        if not SELECTIONS[rule.split(",")[0]].hard: return soft_mixer(mixer, x, state)
        found = literal_mask(rule, x, state, grid, prefix, mask)
        return checks.mixer_reference(mixer, x, state, grid, prefix, found)
    return run


def soft_mixer(mixer, x, state):
    "Linformer's mixtures as the bank: of pairs, or of depth-wise kernels, whose mean is then that of the mixtures."
    if mixer not in checks.DEPTHWISE: return ref.attention_mixer(x, state, 2, checks.reference_of(mixer))
    q, k = ref.heads_of(ref.linear(x, state, "qk"), 2, 2)
    mean = np.stack([(state["selection.E"][head].T @ k[:, head]).mean(1) for head in range(2)], 1)
    return ref.linear(ref.tokens_of(q * mean[:, :, None]), state, "proj")


@rules
@mixers
@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("evaluation", checks.EVALUATIONS)
def test_every_rule_in_every_mixer(rule, mixer, prefix, evaluation):
    "Outputs and gradients of the input and of every parameter, definition and fast evaluation."
    hard = rule in HARD
    module = build(rule, mixer, GRID, prefix, pos="rel" if hard else None, evaluation=evaluation)
    x = checks.random(2, prefix + math.prod(GRID), 6)
    checks.check_module(module, literal(rule, mixer, GRID, prefix), x=x)


def masks(n):
    "A causal mask, and one for each of two images in which some positions may use nothing."
    causal = np.tril(np.ones((n, n), bool))
    images = np.random.default_rng(3).random((2, 1, n, n)) < .5
    images[0, :, 2] = False
    return dict(causal=causal, images=images)


@pytest.mark.parametrize("rule", HARD)
@mixers
@pytest.mark.parametrize("kind", ["causal", "images"])
def test_a_mask_of_the_call_comes_first(rule, mixer, kind):
    "The rule chooses among what the mask allows; positions that may use nothing get zero."
    mask = masks(PREFIX + math.prod(GRID))[kind]
    module = build(rule, mixer, GRID, PREFIX, pos="rel")
    given = module.forward
    module.forward = (lambda x: given(x, is_causal=True)) if kind == "causal" else lambda x: given(x, mask=torch.from_numpy(mask))
    checks.check_module(module, literal(rule, mixer, GRID, PREFIX, mask), x=checks.random(2, PREFIX + math.prod(GRID), 6))


@pytest.mark.parametrize("rule", HARD)
def test_additive_masks_are_read_before_the_rule(rule):
    "Softmax may take an additive mask as a bias; a rule that looks at the answers must not look past it."
    mask = masks(math.prod(GRID))["images"]
    module, x = build(rule, "softmax"), torch.from_numpy(checks.random(2, math.prod(GRID), 6))
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~torch.from_numpy(mask), -torch.inf)
    assert_equal(module(x, mask=additive), module(x, mask=torch.from_numpy(mask)))


@pytest.mark.parametrize("rule", HARD)
@pytest.mark.parametrize("mixer", ["ln_relu", "softmax", "depthwise"])
def test_windows_of_a_batch(rule, mixer):
    "(windows, n, n) masks, as a shifted Swin block hands them over: windows are the fast axis of the batch."
    n = math.prod(GRID)
    mask = torch.from_numpy(np.random.default_rng(5).random((2, n, n)) < .6)
    module, x = build(rule, mixer, pos="rel"), torch.from_numpy(checks.random(4, n, 6))
    one_by_one = torch.cat([module(x[i:i + 1], mask=mask[i % 2]) for i in range(4)])
    assert_equal(module(x, mask=mask), one_by_one)


@pytest.mark.parametrize("rule", HARD)
@pytest.mark.parametrize("mixer", ["softmax", "scaling", "depthwise"])
def test_live_grids(rule, mixer):
    "An image of another size, in passing, is judged by its own map."
    module = build(rule, mixer, GRID, PREFIX)
    module.live_grid = LIVE
    checks.check_module(module, literal(rule, mixer, LIVE, PREFIX), x=checks.random(2, PREFIX + math.prod(LIVE), 6))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_moving_to_another_grid_is_what_a_live_grid_shows(rule, mixer):
    module = build(rule, mixer, GRID, PREFIX)
    x = torch.from_numpy(checks.random(2, PREFIX + math.prod(LIVE), 6))
    module.live_grid = LIVE
    passing = module(x)
    module.live_grid = None
    module.set_grid_size(LIVE)
    torch.testing.assert_close(module(x), passing, rtol=1e-5, atol=1e-6)
    assert module.selection.grid_size == LIVE


def test_projections_are_resized_in_their_own_precision():
    rule = ProjectedKernels((4, 4), 3).double()
    with torch.no_grad(): rule.E.copy_(rule.E + 1e6)
    image = rule.E.transpose(1, 2).unflatten(2, (4, 4))
    wanted = F.interpolate(image, (6, 5), mode="bicubic", antialias=True).flatten(2).transpose(1, 2) * 16 / 30
    assert_equal(rule.resized(rule.E, (6, 5)), wanted)


@rules
@mixers
def test_no_images(rule, mixer):
    module = build(rule, mixer, pos="rel" if rule in HARD else None)
    x = torch.zeros(0, math.prod(GRID), 6, dtype=torch.float64, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@rules
@mixers
def test_meta_device(rule, mixer):
    "Shapes without numbers: how counters and planners look at a model."
    module = build(rule, mixer).to("meta")
    assert module(torch.empty(3, math.prod(GRID), 6, dtype=torch.float64, device="meta")).shape == (3, math.prod(GRID), 6)


@rules
@mixers
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_rules_in_half_precision(rule, mixer, dtype):
    "Half precision with the kernels that half precision selects: close to the same selection in float64."
    module = build(rule, mixer).to(dtype)
    x = torch.from_numpy(checks.random(2, math.prod(GRID), 6)).to(dtype)
    exact = copy.deepcopy(module).double()
    chosen, right = [], module.selection.forward

    def seen(*args):
        found = right(*args)
        chosen.append(found[2])
        return found
    module.selection.forward = seen
    y = module(x)
    if rule in HARD:
        exact.selection = None
        wanted = exact(x.double(), mask=chosen[0])
    else: wanted = exact(x.double())
    assert torch.isfinite(y).all()
    assert (y.double() - wanted).norm() < .05 * wanted.norm()


@rules
@mixers
def test_traced_and_exported(rule, mixer):
    "A graph with any number of images."
    module = build(rule, mixer, GRID, PREFIX, pos="rel" if rule in HARD else None).float()
    x, other = [torch.from_numpy(checks.random(b, PREFIX + math.prod(GRID), 6)).float() for b in (2, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},)).module()
    for graph in traced, exported: torch.testing.assert_close(graph(other), module(other), rtol=1e-4, atol=1e-5)


@rules
@mixers
def test_rules_by_finite_differences(rule, mixer):
    module = build(rule, mixer, pos="rel" if rule in HARD else None)
    assert torch.autograd.gradcheck(module, torch.from_numpy(checks.random(1, math.prod(GRID), 6)).requires_grad_(), fast_mode=True)


@rules
def test_copies_and_state_dicts_of_rules(rule):
    module, x = build(rule, "softmax"), torch.from_numpy(checks.random(2, math.prod(GRID), 6))
    other = build(rule, "softmax")
    other.load_state_dict(module.state_dict())
    for same in other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)): assert_equal(same(x), module(x))
    words = repr(module.selection)
    assert type(module.selection).__name__ in words and '\n' not in words      # messages name it, in one line


@rules
@mixers
def test_hooks_of_a_selection(rule, mixer):
    "A selection is called as every layer: hooks before and after it are asked, and may change what it says."
    module, x, seen = build(rule, mixer), torch.from_numpy(checks.random(2, math.prod(GRID), 6)), []
    module.selection.register_forward_pre_hook(lambda layer, args: seen.append(len(args)))
    handle = module.selection.register_forward_hook(lambda layer, args, out: seen.append(out))
    module.selection.bank.register_forward_hook(lambda layer, args, k: seen.append(k))
    as_ever = module(x)
    arguments, used, (k, _, _) = seen
    assert arguments == 4 and torch.equal(used, k)
    handle.remove()
    module.selection.register_forward_hook(lambda layer, args, out: (out[0].flip(-1), *out[1:]))
    assert (module(x) - as_ever).abs().max() > 1e-3


@given(n=st.integers(1, 12), data=st.data())
@few
def test_topk_settles_ties_by_order(n, data):
    answers = data.draw(st.lists(st.sampled_from([-1., 0., 2.]), min_size=n, max_size=n))
    allowed = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    q, keys = torch.ones(1, 1, 1, 1), torch.tensor(answers).reshape(1, 1, n, 1)
    chosen = TopKernels(k)(q, keys, keys, torch.tensor(allowed)[None])[2][0, 0, 0]
    order = sorted((j for j in range(n) if allowed[j]), key=lambda j: (-answers[j], j))
    assert chosen.nonzero().flatten().tolist() == sorted(order[:k])


def test_shares_of_topk_are_rounded():
    assert [TopKernels(share).count(n) for share, n in [(.3, 9), (.25, 10), (.01, 9), (1., 9), (.5, 4)]] == [3, 3, 1, 9, 2]


@few
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), data=st.data())
def test_neighborhoods_have_k_squared_kernels(size, data):
    k = data.draw(st.sampled_from([k for k in (1, 3, 5, 7, 9) if k <= min(size)]))
    mask = NeighborhoodKernels(k, size).mask(*size)
    assert (mask.sum(1) == k * k).all() and mask.diagonal().all()
    assert all(mask[i, j] == in_neighborhood(i, j, size, k) for i in range(len(mask)) for j in range(len(mask)))


def test_neighborhoods_are_smaller_than_the_map_unless_told_otherwise():
    grids = {(1, 1): 1, (2, 5): 1, (3, 3): 1, (4, 4): 3, (5, 9): 3, (6, 6): 5, (7, 7): 5, (8, 8): 7, (56, 40): 7}
    assert {grid: create_selection("neighborhood", grid).kernel_size for grid in grids} == grids
    assert create_selection("neighborhood", (5, 9), kernel_size=5).mask(5, 9).sum(1).tolist() == [25] * 45


def test_small_maps_have_one_window():
    "timm's rule: a window covers a map that is smaller, and is not shifted."
    rule, q = WindowKernels(7, 3, (5, 6)), normal(1, 1, 30, 2)
    assert rule(q, q, q)[2].all()
    assert (WindowKernels(4, 2, (5, 6))(q, q, q)[2] == torch.from_numpy(in_window((5, 6), 4, 2))).all()


def test_an_object_without_a_map_takes_the_mixers():
    by_name = DynamicConvAttention(6, 2, grid_size=GRID, num_prefix_tokens=1, selection="window", selection_options=dict(window_size=2))
    by_object = DynamicConvAttention(6, 2, grid_size=GRID, num_prefix_tokens=1, selection=WindowKernels(2))
    by_object.load_state_dict(by_name.state_dict())
    x = torch.randn(2, 21, 6)
    assert_equal(by_object(x), by_name(x))


def test_new_rules_register_once():
    from vitdynconv.layers.selections.rule import Selection, register_selection
    @register_selection("diagonal")
    class Diagonal(Selection):
        def mask(self, h, w, device=None): return torch.eye(h * w, dtype=torch.bool, device=device)
    try:
        register_selection("diagonal")(Diagonal)   # a cell that is run twice
        with pytest.raises(ValueError, match="belongs to"): register_selection("diagonal")(TopKernels)
        attn, x = DynamicConvAttention(6, 2, grid_size=GRID, selection="diagonal").double(), normal(2, 20, 6)
        assert_equal(attn(x), attn.proj(attn.qkv(x)[..., 12:]))
    finally: SELECTIONS.pop("diagonal")


@pytest.mark.parametrize("wrong, words", [
    (lambda: create_selection("neighbourhood", 8), "did you mean 'neighborhood'"),
    (lambda: create_selection("window"), "needs grid_size"),
    (lambda: create_selection("neighborhood"), "needs grid_size"),
    (lambda: create_selection("projected"), "needs grid_size"),
    (lambda: WindowKernels(2)(*[normal(1, 1, 4, 2)] * 3), "needs grid_size"),
    (lambda: create_selection("window", 8, size=3), "no option 'size'; it has window_size, shift_size"),
    (lambda: create_selection("all", 8, size=3), "it has none"),
    (lambda: create_selection("neighborhood", 8, kernel_size=4), "odd number from 1 to 7"),
    (lambda: create_selection("neighborhood", (9, 5), kernel_size=7), "odd number from 1 to 5"),
    (lambda: create_selection("neighborhood", 8, kernel_size=-3), "odd number"),
    (lambda: create_selection("neighborhood", 8, kernel_size=3.0), "odd number"),
    (lambda: create_selection("neighborhood", 8, kernel_size=5).set_grid_size(4), "odd number from 1 to 3"),
    (lambda: create_selection("topk", 4, k=17), "choose 1 to 16"),
    (lambda: create_selection("topk", 4, k=16).set_grid_size(3), "choose 1 to 9"),
    (lambda: create_selection("topk", 4, k=0), "k=0"),
    (lambda: create_selection("topk", 4, k=2.5), "k=2.5"),
    (lambda: create_selection("topk", 4, k=True), "k=True"),
    (lambda: create_selection("topk", 4, k=math.nan), "k=nan"),
    (lambda: create_selection("topk", 4, k=math.inf), "k=inf"),
    (lambda: create_selection("topk", 4, k="3"), "k='3'"),
    (lambda: create_selection(TopKernels, 4), "no kernel selection"),
    (lambda: create_selection(7, 4), "no kernel selection"),
    (lambda: create_selection(TopKernels(2), 4, k=3), "go with a selection given by name"),
    (lambda: DynamicConvAttention(6, 2, selection="window"), "needs grid_size"),
    (lambda: DynamicConvAttention(6, 2, grid_size=4, pos="rel", selection="projected"), "soft selection"),
    (lambda: build("window", "softmax")(torch.zeros(1, 7, 6, dtype=torch.float64)), "7 kernels do not fill a map of 4 x 5"),
    (lambda: build("projected", "softmax")(torch.zeros(1, 20, 6, dtype=torch.float64), is_causal=True), "mixes all of them"),
])
def test_bad_selections_get_one_line(wrong, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error: wrong()
    assert "\n" not in str(error.value)
