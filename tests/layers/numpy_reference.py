"""Every operator of the library once more, in plain NumPy, written from the papers.

Nothing here imports torch or the library. A function takes arrays of float64 and returns one.
All of them also accept complex numbers: `slope` differentiates by a step in the imaginary
direction, which is exact to the last digits because nothing is subtracted. That is why ReLU asks
for the sign of the real part and why variances are squares, not absolute values.

Shapes: b images (or images times windows), h heads, n positions, m kernels, d channels of a head.
Masks are bool, True where a position has selected a kernel.
"""

import math
from itertools import product

import numpy as np
from scipy.special import erf

# --------------------------------------------------------------------------------------------------
# Derivatives
# --------------------------------------------------------------------------------------------------


def slope(function, arrays, name, direction, cotangent, step=1e-30):
    """How `sum(cotangent * function(**arrays))` changes as `arrays[name]` moves along `direction`.

    The complex step (Squire and Trapp 1998): f(x + ih u) = f(x) + ih f'(x) u up to h^2.
    """
    moved = dict(arrays)
    moved[name] = arrays[name] + 1j * step * direction
    return float((cotangent * function(**moved)).sum().imag / step)



def central_slope(function, arrays, name, direction, cotangent, step=1e-5):
    """The same by central differences, for functions of real numbers; good to about nine digits."""
    ahead = dict(arrays)
    back = dict(arrays)
    ahead[name] = arrays[name] + step * direction
    back[name] = arrays[name] - step * direction
    return float((cotangent * (function(**ahead) - function(**back))).sum() / (2 * step))


# --------------------------------------------------------------------------------------------------
# Selections and small functions
# --------------------------------------------------------------------------------------------------


def chosen_kernels(logits, mask):
    """Mask of the shape of the logits (..., n, m); all True without one."""
    if mask is None:
        return np.ones(logits.shape, bool)
    return np.broadcast_to(mask, logits.shape)


def count_kernels(logits, mask):
    """How many kernels each position has selected, (..., n, 1); 1 where there is none to count."""
    return np.maximum(chosen_kernels(logits, mask).sum(-1, keepdims=True), 1)


def positive_part(s):
    """relu(s) = max(s, 0), of any shape."""
    return s * (s.real > 0)


def with_bias(weights, bias, mask):
    """Eq. 4: a(s) + B, and zero at kernels that are not selected; (..., n, m)."""
    if bias is not None:
        weights = weights + bias
    return np.where(chosen_kernels(weights, mask), weights, 0)


def scaled(logits, mask, scale, head_dim):
    """The logits (..., n, m) over d, over sqrt(d), over the number of kernels, or as they are."""
    if scale == "head_dim":
        return logits / head_dim
    if scale == "sqrt_head_dim":
        return logits / math.sqrt(head_dim)
    if scale == "num_kernels":
        return logits / count_kernels(logits, mask)
    if scale is None:
        return logits
    raise ValueError(f"no formula for scale={scale!r}")


# --------------------------------------------------------------------------------------------------
# Activations: (logits, bias, mask, settings) -> weights, all (..., n, m)
# `head_dim` is d; other settings carry the names of the options; `weight` and `shift` are
# LayerNorm's parameters.
# --------------------------------------------------------------------------------------------------


def softmax_scores(logits, bias, mask, head_dim, temperature):
    """s / t + B with t = sqrt(d) unless given (Eq. 3), and which kernels compete."""
    if temperature is None:
        temperature = math.sqrt(head_dim)
    scores = logits / temperature
    if bias is not None:
        scores = scores + bias
    return scores, chosen_kernels(scores, mask)


def softmax(logits, bias=None, mask=None, *, head_dim=None, temperature=None):
    """exp(s_j / t + b_j) / sum_l exp(s_l / t + b_l) over the selected kernels (Eq. 3)."""
    scores, chosen = softmax_scores(logits, bias, mask, head_dim, temperature)
    largest = np.where(chosen, scores.real, -np.inf).max(-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    e = np.where(chosen, np.exp(np.where(chosen, scores - largest, 0)), 0)
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def softmax_plus_one(logits, bias=None, mask=None, *, head_dim=None, temperature=None):
    """exp(s_j) / (1 + sum_l exp(s_l)), s = logits / t + B (Miller 2023, "Attention is off by one").

    With c = max(0, s_1, s_2, ...) taken off every exponent, that of the 1 included.
    """
    scores, chosen = softmax_scores(logits, bias, mask, head_dim, temperature)
    largest = np.where(chosen, scores.real, 0).max(-1, keepdims=True, initial=0)
    e = np.where(chosen, np.exp(np.where(chosen, scores - largest, 0)), 0)
    return e / (np.exp(-largest) + e.sum(-1, keepdims=True))


def sparsemax(logits, bias=None, mask=None, *, head_dim=None, temperature=None):
    """The point of the simplex nearest to the scores (arXiv 1602.02068, Eq. 2).

    Found as in Michelot 1986, without sorting: spread what is missing to a sum of one equally over
    the kernels left, drop those that became negative, repeat.
    """
    scores, chosen = softmax_scores(logits, bias, mask, head_dim, temperature)
    support = chosen
    while True:
        left = np.maximum(support.sum(-1, keepdims=True), 1)
        threshold = (np.where(support, scores, 0).sum(-1, keepdims=True) - 1) / left
        kept = support & (scores.real > threshold.real)
        if np.array_equal(kept, support):
            return np.where(support, scores - threshold, 0)
        support = kept


def none(logits, bias=None, mask=None, *, head_dim=None, scale=None):
    """s + B (Table 2, "none")."""
    return with_bias(scaled(logits, mask, scale, head_dim), bias, mask)


def scaling(logits, bias=None, mask=None, *, head_dim=None, scale="head_dim"):
    """s / d + B (Table 2, "scaling": d is the number of channels of each head)."""
    return with_bias(scaled(logits, mask, scale, head_dim), bias, mask)


def scaling_relu(logits, bias=None, mask=None, *, head_dim=None, scale="head_dim"):
    """relu(s / d) + B (Table 2, "scaling + ReLU")."""
    return with_bias(positive_part(scaled(logits, mask, scale, head_dim)), bias, mask)


def normalised_kernels(logits, mask, eps, weight, shift):
    """LayerNorm over the selected kernels of each position, affine parameters (m,) or None."""
    chosen = chosen_kernels(logits, mask)
    n = count_kernels(logits, mask)
    mean = np.where(chosen, logits, 0).sum(-1, keepdims=True) / n
    variance = np.where(chosen, (logits - mean) ** 2, 0).sum(-1, keepdims=True) / n
    normed = (logits - mean) / np.sqrt(variance + eps)
    if weight is not None:
        normed = normed * weight
    if shift is not None:
        normed = normed + shift
    return normed


def ln(logits, bias=None, mask=None, *, head_dim=None, eps=1e-5, weight=None, shift=None):
    """LayerNorm over the kernel axis, plus B (Table 2, "LN"; arXiv 1607.06450, Eq. 4)."""
    return with_bias(normalised_kernels(logits, mask, eps, weight, shift), bias, mask)


def ln_relu(logits, bias=None, mask=None, *, head_dim=None, eps=1e-5, weight=None, shift=None):
    """relu(LayerNorm(s)) + B (Table 2, "LN + ReLU")."""
    weights = positive_part(normalised_kernels(logits, mask, eps, weight, shift))
    return with_bias(weights, bias, mask)


def over_length(weights, logits, bias, mask):
    """f(s) / n + B, n the number of selected kernels (arXiv 2309.08586, section 3)."""
    return with_bias(weights / count_kernels(logits, mask), bias, mask)


def relu(logits, bias=None, mask=None, *, head_dim=None, scale="sqrt_head_dim"):
    """relu(s / sqrt(d)) / n + B (arXiv 2309.08586)."""
    s = scaled(logits, mask, scale, head_dim)
    return over_length(positive_part(s), logits, bias, mask)


def relu_squared(logits, bias=None, mask=None, *, head_dim=None, scale="sqrt_head_dim"):
    """relu(s / sqrt(d))^2 / n + B (Hua et al., arXiv 2202.10447; 2309.08586)."""
    s = scaled(logits, mask, scale, head_dim)
    return over_length(positive_part(s) ** 2, logits, bias, mask)


def gelu(logits, bias=None, mask=None, *, head_dim=None, scale="sqrt_head_dim"):
    """s Phi(s) / n + B, Phi the normal distribution function (arXiv 1606.08415; 2309.08586)."""
    s = scaled(logits, mask, scale, head_dim)
    return over_length(s * (1 + erf(s / math.sqrt(2))) / 2, logits, bias, mask)


def relu6(logits, bias=None, mask=None, *, head_dim=None, scale="sqrt_head_dim"):
    """min(relu(s / sqrt(d)), 6) / n + B (arXiv 2309.08586)."""
    s = positive_part(scaled(logits, mask, scale, head_dim))
    return over_length(np.where(s.real < 6, s, 6), logits, bias, mask)


def softplus(logits, bias=None, mask=None, *, head_dim=None, scale="sqrt_head_dim"):
    """log(1 + exp(s / sqrt(d))) / n + B (arXiv 2309.08586)."""
    s = scaled(logits, mask, scale, head_dim)
    size = np.where(s.real > 0, s, -s)
    return over_length(positive_part(s) + np.log1p(np.exp(-size)), logits, bias, mask)


def sigmoid(logits, bias=None, mask=None, *, head_dim=None, scale="sqrt_head_dim"):
    """1 / (1 + exp(-z)), z = s / sqrt(d) + B - log n (arXiv 2409.04431, Eq. 3)."""
    z = scaled(logits, mask, scale, head_dim) - np.log(count_kernels(logits, mask))
    if bias is not None:
        z = z + bias
    return np.where(chosen_kernels(z, mask), 1 / (1 + np.exp(-z)), 0)


ACTIVATION_REFERENCES = {
    function.__name__: function
    for function in (
        softmax,
        none,
        scaling,
        scaling_relu,
        ln,
        ln_relu,
        relu,
        relu_squared,
        gelu,
        relu6,
        softplus,
        sigmoid,
        softmax_plus_one,
        sparsemax,
    )
}


# --------------------------------------------------------------------------------------------------
# Attention and position
# --------------------------------------------------------------------------------------------------


def attention(q, k, v, activation, bias=None, mask=None):
    """Section 3.1: y_i = sum_j a_j(q_i . k) v_j, one image, one head and one position at a time.

    q (b, h, n, d), k and v (b, h, m, d), bias and mask broadcast to (b, h, n, m); returns
    (b, h, n, d). `activation(logits, bias, mask)` works on one row, (m,).
    """
    b, h, n, _ = q.shape
    shape = (b, h, n, k.shape[2])
    bias = None if bias is None else np.broadcast_to(bias, shape)
    mask = None if mask is None else np.broadcast_to(mask, shape)
    rows = []
    for image, head, i in product(range(b), range(h), range(n)):
        here = (image, head, i)
        row_bias = None if bias is None else bias[here]
        row_mask = None if mask is None else mask[here]
        logits = k[image, head] @ q[here]
        weights = activation(logits, row_bias, row_mask)
        rows.append(weights @ v[image, head])
    return np.stack(rows).reshape(b, h, n, -1)


def offset_row(i, j, grid):
    """Row of the position table for query i and kernel j (Swin, `relative_position_index`).

    The offset i - j, each axis shifted to start at 0, read row by row; grid is (H, W).
    """
    height, width = grid
    down = i // width - j // width + height - 1
    right = i % width - j % width + width - 1
    return down * (2 * width - 1) + right


def relative_bias(table, grid, prefix=0):
    """B of Eq. 4 from a table ((2H-1)(2W-1), c): (c, n, n), n = prefix + H*W.

    Class and register tokens (`prefix` of them, in front) have no bias.
    """
    n = grid[0] * grid[1]
    rows = [[offset_row(i, j, grid) for j in range(n)] for i in range(n)]
    bias = np.zeros((table.shape[1], prefix + n, prefix + n), table.dtype)
    bias[:, prefix:, prefix:] = np.moveaxis(table[np.array(rows)], 2, 0)
    return bias


def depthwise_attention(q, k, bias=None, mask=None):
    """Eq. 5: y_i = q_i * mean_j k_j + sum_j b_ij k_j over the selected j; nothing selected, zero.

    q and k (b, h, n, d); bias (h, n, n), one table per head, or (h*d, n, n), one per channel.
    """
    b, h, n, d = q.shape
    mask = np.broadcast_to(True if mask is None else mask, (b, h, n, n))
    rows = []
    for image, head, i in product(range(b), range(h), range(n)):
        kernels = k[image, head][mask[image, head, i]]
        if len(kernels) == 0:
            rows.append(np.zeros(d, k.dtype))
            continue
        y = q[image, head, i] * kernels.sum(0) / len(kernels)
        if bias is not None:
            tables = bias[head : head + 1] if len(bias) == h else bias[head * d : (head + 1) * d]
            b_i = tables[:, i, mask[image, head, i]]
            y = y + (b_i.T * kernels).sum(0)
        rows.append(y)
    return np.stack(rows).reshape(b, h, n, d)


# --------------------------------------------------------------------------------------------------
# Selections: windows and Linformer
# --------------------------------------------------------------------------------------------------


def window_tokens(grid, window, shift=(0, 0)):
    """Where the tokens of each window come from, and their regions (Swin, `SwinTransformerBlock`).

    The map (H, W) is rolled up and left by `shift`, padded below and at the right to whole windows,
    and cut. Regions are those of Swin's `img_mask`: three slices an axis, at the last window and at
    the last `shift`. Returns two lists over windows: of (row, column) or None for padding, and of
    regions, each in the order of the slots.
    """
    (height, width), (wh, ww), (sh, sw) = grid, window, shift
    full_h = math.ceil(height / wh) * wh
    full_w = math.ceil(width / ww) * ww

    def slice_of(position, full, size, shifted):
        if position < full - size:
            return 0
        if position < full - shifted:
            return 1
        return 2

    tokens = []
    regions = []
    for top, left in product(range(0, full_h, wh), range(0, full_w, ww)):
        sources = []
        numbers = []
        for r, c in product(range(top, top + wh), range(left, left + ww)):
            inside = r < height and c < width
            sources.append(((r + sh) % height, (c + sw) % width) if inside else None)
            row_slice = slice_of(r, full_h, wh, sh)
            numbers.append(3 * row_slice + slice_of(c, full_w, ww, sw))
        tokens.append(sources)
        regions.append(numbers)
    return tokens, regions


def window_masks(grid, window, shift=(0, 0)):
    """Which slots of each window see each other, (windows, area, area): those of one region."""
    _, regions = window_tokens(grid, window, shift)
    return np.array([[[a == b for b in region] for a in region] for region in regions])


def cut_windows(x, window, shift=(0, 0)):
    """(b, H, W, c) to (b * windows, area, c), the windows of one image together, padding zero."""
    tokens, _ = window_tokens(x.shape[1:3], window, shift)
    nothing = np.zeros(x.shape[3], x.dtype)
    cut = []
    for image in x:
        for sources in tokens:
            cut.append([nothing if at is None else image[at] for at in sources])
    return np.array(cut)


def join_windows(windows, grid, window, shift=(0, 0)):
    """The way back: (b * windows, area, c) to (b, H, W, c)."""
    tokens, _ = window_tokens(grid, window, shift)
    images = windows.reshape(-1, len(tokens), *windows.shape[1:])
    x = np.zeros((len(images), *grid, windows.shape[2]), windows.dtype)
    for image, cut in zip(x, images):
        for sources, values in zip(tokens, cut):
            for at, value in zip(sources, values):
                if at is not None:
                    image[at] = value
    return x


def same_plane_window(grid, window, shift=(0, 0)):
    """(H*W, H*W) bool for maps that windows tile: the plane cut into windows, displaced by `shift`.

    Written without roll or regions: two positions see each other if both axes fall into the same
    window, floor((position - shift) / window).
    """
    places = list(product(range(grid[0]), range(grid[1])))

    def cell(place):
        return tuple((p - s) // size for p, s, size in zip(place, shift, window))

    return np.array([[cell(a) == cell(b) for b in places] for a in places])


def neighborhood(grid, size):
    """(H*W, H*W) bool: the `size` x `size` window around each position that lies inside the map.

    At the border the window stops and the position leaves its centre (NATTEN, arXiv 2204.07143).
    """
    places = list(product(range(grid[0]), range(grid[1])))

    def is_near(place, other):
        for p, o, n in zip(place, other, grid):
            centre = min(max(p, size // 2), n - 1 - size // 2)
            if abs(o - centre) > size // 2:
                return False
        return True

    return np.array([[is_near(a, b) for b in places] for a in places])


def best(logits, count):
    """(..., m) bool: the `count` largest of each row (KVT, arXiv 2106.00515)."""
    threshold = np.sort(logits.real, -1)[..., -count, None]
    return logits.real >= threshold


def best_of_tokens(x, state, heads, count):
    """The mask (b, h, n, n) of the `count` best keys of each query, from `qkv` or `qk`."""
    name, parts = ("qkv", 3) if "qkv.weight" in state else ("qk", 2)
    q, k = heads_of(linear(x, state, name), parts, heads)[:2]
    return best(q @ k.swapaxes(2, 3), count)


def projected_kernels(k, v, E, F=None):
    """Linformer (arXiv 2006.04768, Eq. 7): K' = E^T K and V' = F^T V, head by head.

    k and v (b, h, n, d); E and F (h, n, m), or (1, n, m) shared by the heads; F is None where E
    serves both. Returns (b, h, m, d) twice.
    """
    if F is None:
        F = E

    def mixed(bank, projection):
        heads = range(bank.shape[1])
        one = len(projection) == 1
        return np.stack([projection[0 if one else i].T @ bank[:, i] for i in heads], 1)

    return mixed(k, E), mixed(v, F)


# --------------------------------------------------------------------------------------------------
# Mixers of tokens, from a state dict of arrays
# --------------------------------------------------------------------------------------------------


def linear(x, state, name):
    """x (..., in) through the layer `name` of a state dict: x W^T + b, (..., out)."""
    y = x @ state[name + ".weight"].T
    if name + ".bias" in state:
        y = y + state[name + ".bias"]
    return y


def layer_norm(x, state, name, eps=1e-5):
    """LayerNorm over the last axis (arXiv 1607.06450), x unchanged if the layer has no weights."""
    if name + ".weight" not in state:
        return x
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    normed = (x - mean) / np.sqrt(variance + eps)
    return normed * state[name + ".weight"] + state[name + ".bias"]


def heads_of(x, parts, heads):
    """(b, n, parts * h * d) to `parts` arrays (b, h, n, d); parts slowest, then heads."""
    b, n, c = x.shape
    d = c // (parts * heads)
    found = []
    for part in range(parts):
        starts = range(part * heads * d, (part + 1) * heads * d, d)
        found.append(np.stack([x[:, :, start : start + d] for start in starts], 1))
    return found


def tokens_of(y):
    """(b, h, n, d) to (b, n, h * d): the heads side by side."""
    return np.concatenate(list(np.moveaxis(y, 1, 0)), -1)


def mask_of_batch(mask, b):
    """A mask (n, m), (windows, n, m) or (b, h or 1, n, m) for a batch of b images or windows.

    Windows of an image lie together, so image times window number i has mask i modulo windows.
    """
    if mask is None or mask.ndim != 3:
        return mask
    return np.stack([mask[i % len(mask)] for i in range(b)])[:, None]


def causal_mask(n):
    """(n, n): each token selects itself and those before it."""
    return np.array([[j <= i for j in range(n)] for i in range(n)])


def position_of(state, grid, prefix):
    """B from the table of a mixer's state dict, None without a table."""
    table = state.get("relative_position_bias_table")
    return None if table is None else relative_bias(table, grid, prefix)


def activation_of(name, state, head_dim, options=None, prefix="act."):
    """A reference by name with its settings: a function of (logits, bias, mask)."""
    reference = ACTIVATION_REFERENCES[name] if isinstance(name, str) else name
    settings = dict(options or {}, head_dim=head_dim)
    if prefix + "weight" in state:
        settings["weight"] = state[prefix + "weight"]
        settings["shift"] = state[prefix + "bias"]

    def activation(logits, bias=None, mask=None):
        return reference(logits, bias, mask, **settings)

    return activation


def attention_mixer(
    x, state, heads, activation="softmax", options=None, grid=None, prefix=0, mask=None
):
    """`DynamicConvAttention` (section 3.2, Eq. 1, 2 and 4): (b, n, dim) to (b, n, dim).

    State: `qkv`, `proj`, and where there are any `q_norm`, `k_norm`, `act`, `selection.E` and `F`,
    `relative_position_bias_table`. `activation` is a name or a reference.
    """
    q, k, v = heads_of(linear(x, state, "qkv"), 3, heads)
    q = layer_norm(q, state, "q_norm")
    k = layer_norm(k, state, "k_norm")
    if "selection.E" in state:
        k, v = projected_kernels(k, v, state["selection.E"], state.get("selection.F"))
    weights_of = activation_of(activation, state, q.shape[3], options)
    bias = position_of(state, grid, prefix)
    y = attention(q, k, v, weights_of, bias, mask_of_batch(mask, len(x)))
    return linear(tokens_of(y), state, "proj")


def depthwise_mixer(x, state, heads, grid=None, prefix=0, mask=None):
    """`DepthwiseSelfAttention` (section 4.3, Eq. 5): (b, n, dim) to (b, n, dim).

    State: `qk`, `proj`, and where there are any `q_norm`, `k_norm`, `relative_position_bias_table`.
    """
    q, k = heads_of(linear(x, state, "qk"), 2, heads)
    q = layer_norm(q, state, "q_norm")
    k = layer_norm(k, state, "k_norm")
    y = depthwise_attention(q, k, position_of(state, grid, prefix), mask_of_batch(mask, len(x)))
    return linear(tokens_of(y), state, "proj")


def taps_around(i, grid, size):
    """(tap, position) for the neighbours of position i that lie on the map."""
    row, column = divmod(i, grid[1])
    found = []
    for tap, (down, right) in enumerate(product(range(size), repeat=2)):
        r, c = row + down - size // 2, column + right - size // 2
        if 0 <= r < grid[0] and 0 <= c < grid[1]:
            found.append((tap, r * grid[1] + c))
    return found


def depthwise_taps(x, state, heads, size, grid, mask=None, count=None):
    """Depth-wise attention with kernels of size x size (sections 4.3 and 5): (b, n, dim) to the same.

    State: `qk`, `taps`, `proj`, perhaps a table. `mask` (n, n) says which kernels a position averages;
    with `count` it is the `count` whose answers are largest.
    """
    q, centre = heads_of(linear(x, state, "qk"), 2, heads)
    others = list(heads_of(linear(x, state, "taps"), size * size - 1, heads))
    kernels = [*others[: size * size // 2], centre, *others[size * size // 2 :]]
    b, h, n, d = q.shape
    chosen = np.ones((b, h, n, n)) if mask is None else np.broadcast_to(mask, (b, h, n, n)).astype(float)
    if count:
        answers = np.zeros((b, h, n, n), complex)
        for i in range(n):
            for tap, j in taps_around(i, grid, size):
                answers[:, :, i] += np.einsum("bhd,bhmd->bhm", q[:, :, j], kernels[tap])
        chosen = best(answers, count).astype(float)
    bias = position_of(state, grid, 0)
    y = np.zeros((b, h, n, d), complex)
    for i in range(n):
        mine = chosen[:, :, i]
        for tap, j in taps_around(i, grid, size):
            mean = np.einsum("bhm,bhmd->bhd", mine, kernels[tap]) / mine.sum(-1, keepdims=True)
            y[:, :, i] += q[:, :, j] * mean
        if bias is not None:
            y[:, :, i] += np.einsum("hm,bhm,bhmd->bhd", bias[:, i], mine, sum(kernels))
    y = linear(tokens_of(y), state, "proj")
    return y if np.iscomplexobj(x) or any(np.iscomplexobj(w) for w in state.values()) else y.real


def windowed(x, mixer, window, shift=(0, 0)):
    """A mixer of tokens in the windows of a map (b, H, W, c); `mixer(tokens, mask)`."""
    grid = x.shape[1:3]
    mask = window_masks(grid, window, shift)
    return join_windows(mixer(cut_windows(x, window, shift), mask), grid, window, shift)


# --------------------------------------------------------------------------------------------------
# Convolutions
# --------------------------------------------------------------------------------------------------


def pair(value):
    """One number for both axes, or two."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def padded(x, padding, kernel, dilation):
    """(c, H, W) with zeros around it. `padding` is a number, a pair, 'same' or 'valid'."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
        (top, left) = [total // 2 for total in totals]
        (bottom, right) = [total - total // 2 for total in totals]
    else:
        top, left = bottom, right = pair(padding)
    out = np.zeros((len(x), top + x.shape[1] + bottom, left + x.shape[2] + right), x.dtype)
    out[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    return out


def convolution(x, kernel, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """A convolution as deep learning has it, position by position, group by group.

    x (c, H, W), kernel (o, c / groups, kh, kw), bias (o,); returns (o, H', W').
    """
    (sh, sw), (dh, dw) = pair(stride), pair(dilation)
    o, _, kh, kw = kernel.shape
    x = padded(x, padding, (kh, kw), (dh, dw))
    span_h = dh * (kh - 1) + 1
    span_w = dw * (kw - 1) + 1
    height = (x.shape[1] - span_h) // sh + 1
    width = (x.shape[2] - span_w) // sw + 1
    filters = kernel.reshape(groups, o // groups, -1)
    columns = []
    for r, c in product(range(height), range(width)):
        patch = x[:, r * sh : r * sh + span_h : dh, c * sw : c * sw + span_w : dw]
        patch = patch.reshape(groups, -1)
        columns.append(np.concatenate([f @ p for f, p in zip(filters, patch)]))
    y = np.stack(columns, 1).reshape(o, height, width)
    return y if bias is None else y + bias[:, None, None]


def one_dimensional(function, x, *arguments, **options):
    """A convolution of sequences (b, c, n) as one of maps (b, c, 1, n)."""
    return function(x[:, :, None], *arguments, **options)[:, :, 0]


def router(x, state, temperature):
    """p of D-Conv (Chen et al., arXiv 1912.03458, section 3.2), (b, M) for maps (b, c, H, W).

    Global average pooling, a layer that squeezes, ReLU, a layer to M, softmax with temperature.
    """
    pooled = x.mean((2, 3))
    squeezed = positive_part(linear(pooled, state, "router.0"))
    answer = linear(squeezed, state, "router.2")
    return softmax(answer, temperature=temperature)


def dynamic_conv(x, state, temperature, stride=1, padding=0, dilation=1, groups=1):
    """D-Conv (arXiv 1912.03458, Eq. 2): W = sum_m p_m W_m, b = sum_m p_m b_m, then convolve.

    x (b, c, H, W); state: `router.0`, `router.2`, `weight` (M, o, c / groups, kh, kw) and `bias`
    (M, o).
    """
    probabilities = router(x, state, temperature)
    images = []
    for image, p in zip(x, probabilities):
        kernel = sum(p_m * w for p_m, w in zip(p, state["weight"]))
        bias = None
        if "bias" in state:
            bias = sum(p_m * b for p_m, b in zip(p, state["bias"]))
        images.append(convolution(image, kernel, bias, stride, padding, dilation, groups))
    return np.stack(images)


def pointwise_layer(x, state, name):
    """A 1x1 convolution of a map (c, H, W)."""
    return np.moveaxis(linear(np.moveaxis(x, 0, 2), flat_layer(state, name), name), 2, 0)


def flat_layer(state, name):
    """The weights of a 1x1 convolution as those of a linear layer."""
    flat = dict(state)
    weight = state[name + ".weight"]
    flat[name + ".weight"] = weight.reshape(weight.shape[:2])
    return flat


def batch_norm(x, state, name, eps=1e-5):
    """BatchNorm of a map (c, H, W) with stored statistics (arXiv 1502.03167, Algorithm 2)."""
    if name + ".running_mean" not in state:
        return x
    column = {key: state[f"{name}.{key}"][:, None, None] for key in ("weight", "bias")}
    mean = state[name + ".running_mean"][:, None, None]
    variance = state[name + ".running_var"][:, None, None]
    return (x - mean) / np.sqrt(variance + eps) * column["weight"] + column["bias"]


def block_mean(x, stride):
    """Mean of each block of stride x stride positions of (c, H, W), cut off at the border."""
    _, height, width = x.shape
    rows = []
    for top in range(0, height, stride):
        columns = range(0, width, stride)
        rows.append([x[:, top : top + stride, c : c + stride].mean((1, 2)) for c in columns])
    return np.moveaxis(np.array(rows), 2, 0)


def generated_kernels(x, state, pool, stride=1):
    """What a generator makes of one image (c, H, W): (outputs, H', W').

    `pool` is 'image' (global average pooling: one kernel, H' = W' = 1), 'position' (the feature at
    every stride-th position, arXiv 2106.04263, section 3.2), 'block' (the mean of each block,
    involution's code) or an array (H*W, 1), a learned mean. Then squeeze, norm and ReLU where the
    state dict has a `reduce`, and a 1x1 layer `span`.
    """
    if isinstance(pool, np.ndarray):
        means = x.reshape(len(x), -1) @ pool
        x = means[:, :, None] if pool.shape[1] == 1 else means.reshape(x.shape)
    elif pool == "image":
        x = x.mean((1, 2))[:, None, None]
    elif pool == "position":
        x = x[:, ::stride, ::stride]
    elif pool == "block":
        x = block_mean(x, stride)
    else:
        raise ValueError(f"no such pool: {pool!r}")
    if "generator.reduce.weight" in state:
        x = pointwise_layer(x, state, "generator.reduce")
        x = batch_norm(x, state, "generator.norm")
        x = positive_part(x)
    return pointwise_layer(x, state, "generator.span")


def dynamic_depthwise_conv(x, state, kernel_size, pool, stride=1, dilation=1):
    """D-DW-Conv (Han et al., arXiv 2106.04263) and involution (arXiv 2103.06255, Eq. 4 and 6).

    x (b, c, H, W) to (b, c, ceil(H / stride), ceil(W / stride)), zero padded. The generator gives
    (groups * taps) numbers; a group of neighbouring channels shares its kernel; taps row by row.
    """
    kh, kw = pair(kernel_size)
    size = (dilation * (kh // 2), dilation * (kw // 2))
    span_h = dilation * (kh - 1) + 1
    span_w = dilation * (kw - 1) + 1
    images = []
    for image in x:
        made = generated_kernels(image, state, pool, stride)
        channels, height, width = image.shape
        groups = len(made) // (kh * kw)
        around = padded(image, size, (kh, kw), (dilation, dilation))
        out_h = math.ceil(height / stride)
        out_w = math.ceil(width / stride)
        columns = []
        for r, c in product(range(out_h), range(out_w)):
            here = made[:, 0, 0] if made.shape[1:] == (1, 1) else made[:, r, c]
            kernel = here.reshape(groups, kh, kw)
            top, left = r * stride, c * stride
            patch = around[:, top : top + span_h : dilation, left : left + span_w : dilation]
            share = channels // groups
            columns.append([(patch[i] * kernel[i // share]).sum() for i in range(channels)])
        images.append(np.array(columns).T.reshape(channels, out_h, out_w))
    y = np.stack(images)
    return y + state["bias"][:, None, None] if "bias" in state else y


def generated_conv(x, state, kernel_size, pool):
    """A dense convolution whose whole kernel is generated (section 3.3): (b, dim, H, W) to itself.

    The generator gives dim * dim * k * k numbers: output channels, input channels, taps.
    """
    images = []
    for image in x:
        dim, height, width = image.shape
        made = generated_kernels(image, state, pool)
        around = padded(image, kernel_size // 2, pair(kernel_size), (1, 1))
        columns = []
        for r, c in product(range(height), range(width)):
            here = made[:, 0, 0] if made.shape[1:] == (1, 1) else made[:, r, c]
            patch = around[:, r : r + kernel_size, c : c + kernel_size]
            columns.append(here.reshape(dim, -1) @ patch.reshape(-1))
        images.append(np.array(columns).T.reshape(dim, height, width))
    return np.stack(images)


def kernel_attention(
    x,
    state,
    heads,
    kernel_size,
    stride=1,
    activation="softmax",
    options=None,
    grid=None,
    mask=None,
    count=None,
):
    """Self-attention with k x k kernels (section 5): (b, dim, H, W) to (b, out, H', W').

    A k x k convolution of the queries (stride) whose kernels are the keys, the activation over the
    kernels, a k x k convolution whose kernels are the values. State: `query`, `key`, `value`, `out`
    (1x1 convolutions; channels of `key` and `value` are ordered head, channel, tap), `act`,
    `selection.E` and `F`, `relative_position_bias_table`. mask is (H*W, H*W); with `count` each position uses its best kernels only.
    """
    k = kernel_size
    images = []
    for image in x:
        _, height, width = image.shape
        outputs = []
        query, key, value = [pointwise_layer(image, state, n) for n in ("query", "key", "value")]
        query = query.reshape(heads, -1, height, width)
        banks = [t.reshape(1, heads, -1, height * width).swapaxes(2, 3) for t in (key, value)]
        if "selection.E" in state:
            banks = projected_kernels(*banks, state["selection.E"], state.get("selection.F"))
        table = state.get("relative_position_bias_table")
        bias = None if table is None else relative_bias(table, grid)
        weights_of = activation_of(activation, state, query.shape[1], options)
        kept = [r * width + c for r in range(0, height, stride) for c in range(0, width, stride)]
        for head in range(heads):
            keys, values = [bank[0, head].reshape(bank.shape[2], -1, k, k) for bank in banks]
            logits = convolution(query[head], keys, stride=stride, padding=k // 2)
            rows = logits.reshape(len(logits), -1).T
            row_bias = None if bias is None else bias[head][kept]
            row_mask = None if mask is None else mask[kept]
            if count is not None:
                row_mask = best(rows, count)
            weights = weights_of(rows, row_bias, row_mask).T.reshape(logits.shape)
            outputs.append(convolution(weights, values.swapaxes(0, 1), padding=k // 2))
        images.append(pointwise_layer(np.concatenate(outputs), state, "out"))
    return np.stack(images)
