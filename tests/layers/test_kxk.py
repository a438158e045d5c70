"Kernels of k x k: the mixers against NumPy, one position and one tap after the other."
import copy
import itertools
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention

import numpy_reference as ref
import reference_checks as checks
from vitdynconv.fast import dynamic_conv_attention
from vitdynconv.layers.activations import ACTIVATIONS
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.layers.depthwise import DepthwiseSelfAttention
from vitdynconv.layers.kxk import KernelAttention2d
from vitdynconv.layers.mixer import Neighbors
from vitdynconv.layers.selection import SELECTIONS
from vitdynconv.layers.selections.window import WindowKernels

GRID, HEADS = (3, 4), 2


def around(i, grid, k, prefix, mask):
    "(tap, neighbor) of position i: on the map, and allowed by the mask."
    if i < prefix: return [(k * k // 2, i)]
    row, column = divmod(i - prefix, grid[1])
    found = []
    for tap, (down, right) in enumerate(itertools.product(range(k), repeat=2)):
        r, c = row + down - k // 2, column + right - k // 2
        if not (0 <= r < grid[0] and 0 <= c < grid[1]): continue
        j = prefix + r * grid[1] + c
        if j == i or mask is None or mask[i, j]: found.append((tap, j))
    return found


def kernels_of(x, state, center, part, parts, k):
    "(b, h, n, d, taps): the center, and a part of the layer `taps`."
    inner = center.shape[1] * center.shape[3]
    others = ref.linear(x, state, "taps")
    made = []
    for tap in range(k * k - 1):
        start = (part * (k * k - 1) + tap) * inner
        made.append(ref.heads_of(others[..., start:start + inner], 1, center.shape[1])[0])
    made.insert(k * k // 2, center)
    return np.stack(made, -1)


def pair_of_kernels(x, state, name, k, grid, prefix, mask, links=None):
    "`DynamicConvAttention` with kernels of k x k."
    links = mask if links is None else links
    q, key, value = ref.heads_of(ref.linear(x, state, "qkv"), 3, HEADS)
    K = kernels_of(x, state, key, 0, 2, k)
    V = kernels_of(x, state, value, 1, 2, k)
    b, h, n, d = q.shape
    near = [around(i, grid, k, prefix, links) for i in range(n)]
    bias = ref.position_of(state, grid, prefix)
    weights_of = ref.activation_of(checks.reference_of(name), state, d)
    weights = np.zeros((b, h, n, n), complex)
    for image, head, i in itertools.product(range(b), range(h), range(n)):
        logits = sum(K[image, head, :, :, tap] @ q[image, head, j] for tap, j in near[i])
        weights[image, head, i] = weights_of(logits, None if bias is None else bias[head, i], None if mask is None else mask[i])
    y = np.zeros((b, h, n, d), complex)
    for i in range(n):
        for tap, j in near[i]: y[:, :, i] += np.einsum("bhm,bhmd->bhd", weights[:, :, j], V[..., tap])
    y = ref.linear(ref.tokens_of(y), state, "proj")
    return y if np.iscomplexobj(x) or any(np.iscomplexobj(w) for w in state.values()) else y.real


def depthwise_kernels(x, state, k, grid, prefix, mask):
    "`DepthwiseSelfAttention` with kernels of k x k."
    q, key = ref.heads_of(ref.linear(x, state, "qk"), 2, HEADS)
    K = kernels_of(x, state, key, 0, 1, k)
    bias = ref.position_of(state, grid, prefix)
    b, h, n, d = q.shape
    y = np.zeros((b, h, n, d), complex)
    for head, i in itertools.product(range(h), range(n)):
        chosen = np.arange(n) if mask is None else np.flatnonzero(mask[i])
        if len(chosen) == 0: continue
        bank = K[:, head, chosen]                                       # (b, selected, d, taps)
        for tap, j in around(i, grid, k, prefix, mask): y[:, head, i] += q[:, head, j] * bank[..., tap].mean(1)
        if bias is None: continue
        tables = bias[head:head + 1] if len(bias) == h else bias[head * d:(head + 1) * d]
        y[:, head, i] += (tables[:, i, chosen].T * bank.sum(-1)).sum(1)
    y = ref.linear(ref.tokens_of(y), state, "proj")
    return y if np.iscomplexobj(x) or any(np.iscomplexobj(w) for w in state.values()) else y.real


def reference(mixer, k, grid, prefix, mask=None):
    if mixer in checks.DEPTHWISE: return lambda x, state: depthwise_kernels(x, state, k, grid, prefix, mask)
    return lambda x, state: pair_of_kernels(x, state, mixer, k, grid, prefix, mask)


def mask_of(kind, n):
    if kind == "none": return None
    if kind == "causal": return np.tril(np.ones((n, n), bool))
    regions = np.arange(n) % 5 < 2                                     # two regions, as in a shifted window
    if kind == "regions": return regions[:, None] == regions
    found = np.random.default_rng(1).random((n, n)) < .6
    found[2] = False                                                   # one position selects nothing
    return found


@pytest.mark.parametrize("mixer", [*ACTIVATIONS, *checks.DEPTHWISE])
@pytest.mark.parametrize("kind", ["none", "causal", "regions", "random"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_mixers_against_loops(mixer, kind, prefix):
    n = prefix + math.prod(GRID)
    mask = mask_of(kind, n)
    module = checks.make_mixer(mixer, "rel", GRID, prefix, kernel_size=3)
    module = checks.prepared(module, .3)
    given = module.forward
    if mask is not None: module.forward = lambda x: given(x, mask=torch.from_numpy(mask))
    checks.check_module(module, reference(mixer, 3, GRID, prefix, mask), x=checks.random(2, n, 6), tol=1e-11)


@pytest.mark.parametrize("mixer", ["softmax", "scaling", "ln_relu", *checks.DEPTHWISE])
@pytest.mark.parametrize("k", [3, 5])
def test_fast_evaluations_and_sizes(mixer, k):
    module = checks.make_mixer(mixer, "rel", (4, 5), 1, "fast", kernel_size=k)
    module = checks.prepared(module, .2)
    checks.check_module(module, reference(mixer, k, (4, 5), 1), x=checks.random(2, 21, 6), tol=1e-11)


@pytest.mark.parametrize("mixer", ["softmax", "depthwise"])
def test_windows_of_a_batch_with_additive_masks(mixer):
    "Swin hands over (windows, n, n) of 0 and -100; neighbors across a region's border are not read."
    n = math.prod(GRID)
    masks = np.stack([mask_of("regions", n), np.ones((n, n), bool)])
    module = checks.make_mixer(mixer, "rel", GRID, 0, kernel_size=3)
    x = torch.from_numpy(checks.random(4, n, 6))
    additive = torch.zeros(2, n, n, dtype=torch.float64).masked_fill(~torch.from_numpy(masks), -100.)
    one_by_one = torch.cat([module(x[i:i + 1], mask=torch.from_numpy(masks[i % 2])) for i in range(4)])
    torch.testing.assert_close(module(x, mask=additive), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [DynamicConvAttention, DepthwiseSelfAttention])
def test_size_one_is_todays_module(cls):
    torch.manual_seed(0)
    plain = cls(24, 3, pos="rel", grid_size=GRID)
    torch.manual_seed(0)
    one = cls(24, 3, pos="rel", grid_size=GRID, kernel_size=1)
    x = torch.randn(2, 12, 24)
    assert plain.state_dict().keys() == one.state_dict().keys()
    assert torch.equal(plain(x), one(x))


@pytest.mark.parametrize("theirs", [lambda: Attention(24, 3, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm), lambda: WindowAttention(24, 3, window_size=GRID)])
def test_timm_modules_start_where_they_were(theirs):
    theirs = checks.prepared(theirs(), .3)
    x = torch.from_numpy(checks.random(2, 12, 24))
    for size in 3, 5:
        ours = DynamicConvAttention.from_timm(theirs, kernel_size=size, grid_size=GRID)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)
        for name, w in theirs.state_dict().items():
            if name in ours.state_dict(): assert torch.equal(w, ours.state_dict()[name]), name


def test_a_mixer_with_taps_is_taken_over_with_them():
    old = checks.prepared(DynamicConvAttention(6, 2, kernel_size=3, grid_size=GRID))
    x = torch.from_numpy(checks.random(2, 12, 6))
    assert torch.equal(DynamicConvAttention.from_timm(old, grid_size=GRID)(x), old(x))
    wider = DynamicConvAttention.from_timm(old, grid_size=GRID, kernel_size=5)
    assert wider.taps.out_features == 24 * 12 and not wider.taps.weight.any()
    old = checks.prepared(DepthwiseSelfAttention(6, 2, kernel_size=3, grid_size=GRID))
    assert torch.equal(DepthwiseSelfAttention.from_timm(old, grid_size=GRID)(x), old(x))


@pytest.mark.parametrize("mixer", ["softmax", "scaling", "depthwise"])
def test_live_grid(mixer):
    module = checks.make_mixer(mixer, None, GRID, 1, kernel_size=3)
    module.live_grid = 5, 4
    checks.check_module(module, reference(mixer, 3, (5, 4), 1), x=checks.random(2, 21, 6), tol=1e-11)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("mixer", ["softmax", "ln_relu", "depthwise"])
def test_selections_see_whole_kernels(name, mixer):
    "A rule picks or mixes kernels of k x k as it does those of 1 x 1; topk looks at the answers of all taps."
    module = checks.make_mixer(mixer, None, (4, 4), 0, kernel_size=3, selection=name)
    x, found, right = torch.from_numpy(checks.random(2, 16, 6)), [], module.selection.forward

    def seen(*args):
        found.append((args, right(*args)))
        return found[-1][1]
    module.selection.forward = seen
    y = module(x)
    (q, k, v, _), (new_k, new_v, mask) = found[0]
    assert q.shape == k.shape == (2, 2, 16, 27)
    assert new_k.shape == (2, 2, module.bank_size(), 27) and torch.isfinite(y).all()
    if name == "topk":
        answers = q @ k.transpose(-2, -1)
        assert (answers.masked_fill(~mask, math.inf).amin(-1) >= answers.masked_fill(mask, -math.inf).amax(-1)).all()


MODULES = {
    "softmax": lambda: DynamicConvAttention(8, 2, kernel_size=3, grid_size=(3, 2), pos="rel"),
    "scaling": lambda: DynamicConvAttention(8, 2, kernel_size=3, grid_size=(3, 2), activation="scaling", backend=dynamic_conv_attention),
    "depth-wise": lambda: DepthwiseSelfAttention(8, 2, kernel_size=3, grid_size=(3, 2), pos="rel"),
}
modules = pytest.mark.parametrize("name", MODULES)


def tokens(b, seed=0): return torch.randn(b, 6, 8, generator=torch.Generator().manual_seed(seed))


@modules
def test_gradients_by_finite_differences(name):
    module = checks.prepared(MODULES[name](), .3)
    assert torch.autograd.gradcheck(module, tokens(2).double().requires_grad_())


@modules
def test_copies_empty_batches_and_meta(name):
    module, x = MODULES[name]().eval(), tokens(2)
    fresh = MODULES[name]().eval()
    fresh.load_state_dict(module.state_dict())
    for other in copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh: assert torch.equal(other(x), module(x))
    assert module(x[:0]).shape == (0, 6, 8)
    assert module.to("meta")(x.to("meta")).shape == x.shape


@modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_half_precision(name, dtype):
    module, x = MODULES[name]().eval(), tokens(2)
    exact = module(x)
    out = copy.deepcopy(module).to(dtype)(x.to(dtype)).float()
    assert torch.isfinite(out).all() and (out - exact).norm() < .05 * exact.norm()


@modules
def test_graphs_with_any_batch_size(name):
    module, x = MODULES[name]().eval(), tokens(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},)).module()
    for graph in traced, exported: torch.testing.assert_close(graph(tokens(5, 1)), module(tokens(5, 1)), rtol=1e-4, atol=1e-5)


def test_memory_stays_below_a_copy_per_tap():
    "Never n k^2 x n numbers: the largest tensor saved for backward has n x n for each head, or n x k^2 d."
    module, largest = DynamicConvAttention(8, 1, kernel_size=5, grid_size=16), []
    def note(t):
        largest.append(t.untyped_storage().nbytes() // 4)
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): module(torch.randn(1, 256, 8, requires_grad=True))
    assert max(largest) <= max(256 * 256, 256 * 25 * 8 * 2)


def test_reading_and_adding_are_transposes():
    "<read(x), y> = <x, add'(y)> where the taps are turned around: the center keeps its place."
    near = Neighbors((4, 5), 3, 1)
    x, y = torch.randn(21, 3, dtype=torch.float64), torch.randn(21, 27, dtype=torch.float64)
    turned = y.unflatten(-1, (3, 9)).flip(-1).flatten(-2)
    left = (near.read(x)[1:] * y[1:]).sum() + (x[0] * y[0].reshape(3, 9)[:, 4]).sum()
    torch.testing.assert_close(left, (x * near.add(turned)).sum())


@pytest.mark.parametrize("wrong, words", [
    (lambda: DynamicConvAttention(8, 2, kernel_size=2, grid_size=4), "kernel_size=2 has no center"),
    (lambda: DynamicConvAttention(8, 2, kernel_size=0, grid_size=4), "kernel_size=0"),
    (lambda: DynamicConvAttention(8, 2, kernel_size=3.0, grid_size=4), "kernel_size=3.0"),
    (lambda: DynamicConvAttention(8, 2, kernel_size=True, grid_size=4), "kernel_size=True"),
    (lambda: DynamicConvAttention(8, 2, kernel_size=3), "needs grid_size"),
    (lambda: DepthwiseSelfAttention(8, 2, kernel_size=4, grid_size=4), "kernel_size=4"),
    (lambda: KernelAttention2d(8, 2, 4), "kernel_size=4"),
    (lambda: KernelAttention2d(8, 2, stride=0), "stride=0"),
    (lambda: KernelAttention2d(8, 2, stride=1.5), "stride=1.5"),
    (lambda: KernelAttention2d(8, 2, selection="nearest"), "unknown selection"),
])
def test_wrong_settings_are_answered(wrong, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error: wrong()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [None, *SELECTIONS])
@pytest.mark.parametrize("make", [
    lambda **rule: KernelAttention2d(8, 2, stride=2, num_kernels=16, **rule),
    lambda **rule: DynamicConvAttention(8, 2, kernel_size=3, **rule),
    lambda **rule: DepthwiseSelfAttention(8, 2, kernel_size=3, **rule)], ids=["block", "pair", "depth-wise"])
def test_every_layer_is_called_so_that_hooks_are_asked(make, name):
    "Once each; dropout of the weights alone is called only where there is something to drop."
    module, called = make(selection=name, grid_size=(4, 4)), []
    layers = {path: layer for path, layer in module.named_modules() if path != "attn_drop"}
    for path, layer in layers.items(): layer.register_forward_hook(lambda layer, args, out, path=path: called.append(path))
    shape = (2, 8, 4, 4) if isinstance(module, KernelAttention2d) else (2, 16, 8)
    module(torch.randn(shape))
    assert sorted(called) == sorted(layers)
    if name is None: return
    as_ever = module(torch.ones(shape) + torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    module.selection.register_forward_hook(lambda layer, args, out: (out[0].flip(-1), *out[1:]))
    changed = module(torch.ones(shape) + torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(changed, as_ever), "a hook may change what the selection says"


def test_a_block_moves_its_rule_to_the_map_at_hand():
    "Windows of a map of another size are those of a block that was built for it."
    torch.manual_seed(0)
    block = KernelAttention2d(4, 2, selection=WindowKernels(2, 1, grid_size=(4, 4)))
    x, y = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 6, 8)
    first, other = block(x), block(y)
    assert torch.equal(other, block.literal(y)) or (other - block.literal(y)).abs().max() < 1e-5
    assert torch.equal(block(x), first)
    own = copy.deepcopy(block)
    own.selection = WindowKernels(2, 1, grid_size=(6, 8))
    assert torch.equal(own(y), other)
