"""Every cell of the design space against NumPy, from its specification alone."""

from itertools import product

import numpy as np
import pytest

import numpy_reference as ref
from reference_checks import *
from vitdynconv.framework import build, design_space


CELLS = [cell.spec for cell in design_space() if cell.reason is None]
BEST = 3  # kernels that `build` selects for top-k; its neighborhood is 3 x 3
CELL_NAMES = ["-".join(map(str, vars(spec).values())) for spec in CELLS]


def below(state, name):
    """The part of a state dict that belongs to a submodule."""
    return {key[len(name) + 1 :]: a for key, a in state.items() if key.startswith(name + ".")}


def cell_reference(spec, x, state, grid, heads):
    """What `build(spec)` should compute, (b, c, H, W) to the same, from the specification alone."""
    if spec.position == "abs":
        plain = vars(spec) | dict(position=None)
        inner = type(spec)(**plain)
        return cell_reference(inner, x + state["pos_embed"], below(state, "mixer"), grid, heads)
    if spec.selection == "local":
        plain = type(spec)(**(vars(spec) | dict(selection="all")))
        half = (grid[0] // 2, grid[1] // 2)
        y = np.zeros(x.shape, np.result_type(x, *state.values()))
        for top, left in product((0, half[0]), (0, half[1])):
            window = np.s_[:, :, top : top + half[0], left : left + half[1]]
            y[window] = cell_reference(plain, x[window], below(state, "mixer"), half, heads)
        return y
    size = spec.kernel_size
    mask = ref.neighborhood(grid, 3) if spec.selection == "neighborhood" else None
    if spec.kernel_type == "pair" and size > 1:
        act = reference_of(spec.activation)
        count = BEST if spec.selection == "topk" else None
        return ref.kernel_attention(x, state, heads, size, 1, act, None, grid, mask, count)
    if any(key.startswith("mixer.") for key in state):
        tokens = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
        inner = below(state, "mixer")
        if "taps.weight" in inner:
            count = BEST if spec.selection == "topk" else None
            y = ref.depthwise_taps(tokens, inner, heads, size, grid, mask, count)
            return y.swapaxes(1, 2).reshape(x.shape)
        if spec.selection == "topk":
            mask = ref.best_of_tokens(tokens, inner, heads, BEST)
        name = spec.activation or "depthwise"
        y = mixer_reference(name, tokens, inner, grid, 0, mask, heads)
        return y.swapaxes(1, 2).reshape(x.shape)
    depthwise = spec.kernel_type == "depthwise"
    if spec.bank == "static":
        groups = x.shape[1] if depthwise else 1
        return ref.dynamic_conv(x, state, 1.0, padding=size // 2, groups=groups)
    pool = "position" if spec.bank == "none" else "image"
    if spec.selection == "soft":
        pool = state["generator.pool.E"][0]
    if mask is not None:
        pool = (mask / mask.sum(1, keepdims=True)).T
    if depthwise:
        return ref.dynamic_depthwise_conv(x, state, size, pool)
    return ref.generated_conv(x, state, size, pool)


@pytest.mark.parametrize("spec", CELLS, ids=CELL_NAMES)
def test_design_space(spec):
    grid = (4, 6)
    module = prepared(build(spec, 4, grid, 2), 0.3)
    check_module(
        module,
        lambda x, state: cell_reference(spec, x, state, grid, 2),
        x=random(2, 4, *grid),
    )
