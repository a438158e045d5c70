"""Selections and mixers of tokens against NumPy: windows, Linformer, masks of every shape."""

from itertools import product

import numpy as np
import pytest
import torch

import numpy_reference as ref
from reference_checks import *
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from vitdynconv.layers.position import resize_per_kernel
from vitdynconv.layers.selections.projected import ProjectedKernels
from vitdynconv.layers.selections.window import WindowKernels


WINDOWS = [  # grid, window, shift
    ((4, 6), (2, 3), (0, 0)),
    ((4, 6), (2, 3), (1, 1)),
    ((4, 6), (4, 3), (0, 2)),
    ((6, 4), (3, 2), (2, 1)),
    ((5, 7), (3, 3), (0, 0)),
    ((5, 7), (3, 3), (1, 1)),
    ((3, 7), (2, 4), (1, 3)),
]


@pytest.mark.parametrize("grid, window, shift", WINDOWS)
def test_windows(grid, window, shift):
    rule = WindowKernels(window, shift)
    x = random(2, *grid, 3)
    cut = ref.cut_windows(x, window, shift)
    assert_near(rule.partition(torch.from_numpy(x)), cut, "windows")
    assert_near(rule.reverse(torch.from_numpy(cut), *grid), x, "joined windows")
    assert_near(torch.from_numpy(ref.join_windows(cut, grid, window, shift)), x, "the reference")
    masks = ref.window_masks(grid, window, shift)
    ours = rule.window_mask(*grid)
    assert (ours is None) == (not any(shift))
    assert np.array_equal(np.ones_like(masks) if ours is None else ours.numpy(), masks)


@pytest.mark.parametrize("grid, window, shift", WINDOWS)
def test_window_mask_over_the_map(grid, window, shift):
    """Each token's window, region and slot, looked up in the reference's list of windows."""
    tokens, _ = ref.window_tokens(grid, window, shift)
    masks = ref.window_masks(grid, window, shift)
    n = grid[0] * grid[1]
    expected = np.zeros((n, n), bool)
    slots = np.zeros((n, n, 2), int)
    for sources, mask in zip(tokens, masks):
        for (a, at), (b, to) in product(enumerate(sources), repeat=2):
            if at is not None and to is not None and mask[a, b]:
                i, j = at[0] * grid[1] + at[1], to[0] * grid[1] + to[1]
                expected[i, j] = True
                slots[i, j] = a, b
    rule = WindowKernels(window, shift)
    ours = rule.mask(*grid).numpy()
    assert np.array_equal(ours[:, :n], expected)
    area = window[0] * window[1]
    padding = len(tokens) * area - n
    assert ours.shape == (n, n + padding)
    bias = random(2, area, area)
    spread = rule.spread(torch.from_numpy(bias), *grid).numpy()[:, :, :n]
    assert np.array_equal(spread[:, expected], bias[:, slots[..., 0], slots[..., 1]][:, expected])
    if padding == 0:
        assert np.array_equal(expected, ref.same_plane_window(grid, window, shift))


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("grid, window, shift", WINDOWS[1:7:2])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_in_windows(name, grid, window, shift, evaluation):
    rule = WindowKernels(window, shift)
    mixer = make_mixer(name, "rel", window, 0, evaluation)

    def ours(x):
        windows = mixer(rule.partition(x), mask=rule.window_mask(*grid))
        return rule.reverse(windows, *grid)

    def reference(x, **state):
        def tokens(windows, mask):
            return mixer_reference(name, windows, state, window, 0, mask)

        return ref.windowed(x, tokens, window, shift)

    case = "windows", name, grid, window, shift
    check(ours, reference, {"x": random(2, *grid, 6)}, mixer.named_parameters(), case=case)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("share", ["none", "heads", "kv", "layers"])
def test_projected_kernels(share, prefix):
    bank = prepared(ProjectedKernels(GRID, 5, HEADS, share=share, num_prefix_tokens=prefix))
    n = GRID[0] * GRID[1] + prefix
    assert (bank.F is None) == (share in ("kv", "layers"))
    assert len(bank.E) == (HEADS if share == "none" else 1)
    inputs = {name: random(BATCH, HEADS, n, DIM, seed=i) for i, name in enumerate("kv")}

    def reference(k, v, E, F=None):
        return np.stack(ref.projected_kernels(k, v, E, F))

    def ours(k, v):
        k, v, mask = bank(None, k, v)
        assert mask is None
        return torch.stack([k, v])

    check(ours, reference, inputs, bank.named_parameters())


MIXER_MASKS = ("none", "plane", "windows", "images", "heads", "empty", "additive", "causal")


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("mask", MIXER_MASKS)
@pytest.mark.parametrize("pos, prefix", [(None, 0), ("rel", 0), ("rel", 1)])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers(name, pos, prefix, mask, evaluation):
    grid = (2, 3)
    n = grid[0] * grid[1] + prefix
    b = 4 if mask == "windows" else 2
    mixer = make_mixer(name, pos, grid, prefix, evaluation)
    if mask == "windows":
        chosen = make_mask("images", 2, 2, n, n)[:, 0]
    elif mask == "causal":
        chosen = ref.causal_mask(n)
    else:
        chosen = make_mask("plane" if mask == "additive" else mask, b, 2, n, n)
    arguments = dict(mask=as_tensor(chosen))
    if mask == "additive":
        arguments = dict(attn_mask=torch.where(as_tensor(chosen), 0.0, -100.0).double())
    if mask == "causal":
        arguments = dict(is_causal=True)

    def reference(x, **state):
        return mixer_reference(name, x, state, grid, prefix, chosen)

    inputs = {"x": random(b, n, 6)}
    case = "mixer", name, pos, prefix, mask
    check(lambda x: mixer(x, **arguments), reference, inputs, mixer.named_parameters(), case=case)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("name", ["softmax", "ln_relu", "depthwise"])
@pytest.mark.parametrize("settings", [
    dict(qk_norm=True),
    dict(qkv_bias=False),
    dict(proj_bias=False),
    dict(head_dim=5),
])
def test_mixers_of_other_shapes(name, settings, evaluation):
    mixer = make_mixer(name, "rel", (2, 3), 1, evaluation, **settings)
    check_module(
        mixer,
        lambda x, state: mixer_reference(name, x, state, (2, 3), 1, None),
        case=("other shapes", name, str(settings)),
        tol=5 * TOL,  # LayerNorm cancels the shift of normalised keys: what is left of its gradient is rounding
        x=random(2, 7, 6),
    )


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("share", ["none", "heads", "kv", "layers"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linformer(name, share, evaluation):
    bank = ProjectedKernels((2, 3), 4, 2, share=share, num_prefix_tokens=1)
    mixer = make_mixer(name, None, (2, 3), 1, evaluation, selection=bank, num_kernels=4)
    check_module(
        mixer,
        lambda x, state: mixer_reference(name, x, state, (2, 3), 1, None),
        case=("linformer", name, share),
        x=random(2, 7, 6),
    )


# --------------------------------------------------------------------------------------------------
# Taking over timm's modules
# --------------------------------------------------------------------------------------------------


def test_normalised_queries_and_keys_are_carried_over():
    norm = torch.nn.LayerNorm
    theirs = prepared(Attention(6, 2, qkv_bias=True, qk_norm=True, norm_layer=norm))
    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    ours = DynamicConvAttention.from_timm(theirs)
    x = random(2, 7, 6)
    expected = ref.attention_mixer(x, state, 2)
    assert_near(ours(torch.from_numpy(x)), expected, "outputs")


def test_the_table_of_a_head_goes_to_each_of_its_channels():
    theirs = prepared(WindowAttention(6, 2, window_size=(2, 3)))
    ours = DepthwiseSelfAttention.from_timm(theirs, pos_per="channel")
    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    qk = {"qk.weight": state["qkv.weight"][:12], "qk.bias": state["qkv.bias"][:12]}
    x = random(2, 6, 6)
    expected = ref.depthwise_mixer(x, state | qk, 2, (2, 3))
    assert_near(ours(torch.from_numpy(x)), expected, "outputs")


def test_per_kernel_weights_of_a_ramp_stay_a_ramp():
    """Bicubic interpolation keeps straight lines away from the border; the nearest entry makes steps."""
    ramp = torch.arange(8.0).repeat(8, 1).flatten()
    larger = resize_per_kernel(ramp, (8, 8), (16, 16)).unflatten(0, (16, 16))[8, 4:12]
    torch.testing.assert_close(larger.diff(), torch.full((7,), 0.5), rtol=0, atol=1e-4)
