"""Attention and depth-wise attention, the definitions and the fast evaluations, against loops in NumPy."""

import numpy as np
import pytest
import torch

import numpy_reference as ref
from reference_checks import *
from vitdynconv import fast
from vitdynconv.fast import dispatch, relative_position, tiled
from vitdynconv.layers.depthwise import depthwise_attention
from vitdynconv.layers.equivalence import attention, attention_as_convs
from vitdynconv.layers.position import RelativePosition, table_to_bias


WAYS = ("by_fft", "by_fourier_rows", "by_convolution")

TOL = 1e-12
HALF_UNITS = 1  # units in the last place that a half-precision result may be off
BATCH, HEADS, DIM = 2, 2, 4  # images, heads, channels of a head
GRID = (3, 4)


# --------------------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------------------


def random(*shape, seed=0, size=1.0):
    """Normal numbers, float64."""
    return size * np.random.default_rng([seed, *shape]).standard_normal(shape)


def assert_near(actual, expected, what, tol=TOL):
    """One shape, float64, and a difference below `tol` of the largest value (of 1 at least)."""
    assert actual.dtype == torch.float64, what
    actual = actual.detach().numpy()
    assert actual.shape == expected.shape, what
    assert np.isfinite(expected).all(), "the reference itself is not finite"
    assert np.isfinite(actual).all(), f"{what} not finite"
    limit = tol * max(1, np.abs(expected).max(initial=0))
    worst = np.abs(actual - expected).max(initial=0)
    assert worst <= limit, f"{what} differ by {worst:.1e}, allowed {limit:.1e}"


def check(ours, reference, inputs, parameters=None, tol=TOL):
    """Outputs, with and without gradients at work, and one slope for each input and parameter.

    `ours(**tensors)` against `reference(**arrays)`; `parameters` are those that `ours` has inside.
    """
    parameters = dict(parameters or {})
    arrays = inputs | {name: p.detach().numpy() for name, p in parameters.items()}
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in inputs.items()}
    actual = ours(**leaves)
    expected = reference(**arrays)
    assert_near(actual, expected, "outputs", tol)
    with torch.no_grad():
        assert_near(ours(**leaves), expected, "outputs without gradients", tol)
    cotangent = random(*expected.shape, seed=7)
    wanted = {**leaves, **parameters}
    grads = torch.autograd.grad(
        actual, list(wanted.values()), torch.from_numpy(cotangent), materialize_grads=True
    )
    for name, grad in zip(wanted, grads):
        grad = grad.numpy()
        direction = random(*grad.shape, seed=8)
        expected = ref.slope(reference, arrays, name, direction, cotangent)
        assert np.isfinite(grad).all(), f"gradient of {name} not finite"
        limit = tol * max(1, np.abs(grad * direction).sum(), abs(expected))
        worst = abs((grad * direction).sum() - expected)
        assert worst <= limit, f"gradients of {name} differ by {worst:.1e}, allowed {limit:.1e}"


def prepared(module, size=0.5):
    """Random parameters and statistics, float64, evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        nn.init.normal_(p, std=size, generator=generator)
    for name, b in module.named_buffers():
        if "running" in name:
            b.uniform_(0.5, 2, generator=generator)
    return module.double().eval()


def buffers(module):
    """The buffers of a state dict as arrays, to be added to a reference's state."""
    return {name: b.numpy() for name, b in module.named_buffers() if b is not None}


def check_module(module, reference, tol=TOL, **inputs):
    """A module against `reference(x, state)`, its parameters included."""
    constant = buffers(module)

    def from_state(x, **state):
        return reference(x, {**constant, **state})

    check(lambda x: module(x), from_state, inputs, module.named_parameters(), tol)


# --------------------------------------------------------------------------------------------------
# Activations and their settings
# --------------------------------------------------------------------------------------------------

TRIED = dict(  # option -> values; {} stands for the default
    temperature=[0.7, 3.0],
    scale=["head_dim", "sqrt_head_dim", "num_kernels", None],
    eps=[0.3],
    elementwise_affine=[False],
)


def reference_of(name):
    """The formula of an activation: its own `reference`, else the one of this name."""
    cls = ACTIVATIONS[name]
    if "reference" in vars(cls):
        return cls.reference
    if name not in ref.ACTIVATION_REFERENCES:
        raise AssertionError(f"{name} has no formula to be judged by; give {cls.__name__} its own "
                             "static method reference(logits, bias=None, mask=None, **settings)")
    return ref.ACTIVATION_REFERENCES[name]


def options_of(name):
    """Every option of an activation, one at a time, and none."""
    found = [{}]
    for option in inspect.signature(ACTIVATIONS[name].__init__).parameters:
        if option not in ("self", "num_kernels", "head_dim", "args", "kwargs"):
            found += [{option: value} for value in TRIED[option]]
    return found


SETTINGS = [(name, options) for name in ACTIVATIONS for options in options_of(name)]
SETTING_NAMES = [f"{name}-{options or 'default'}" for name, options in SETTINGS]


def judge(name, options, head_dim, **parameters):
    """The reference of an activation with settings: a function of (logits, bias, mask)."""
    reference = reference_of(name)
    settings = {key: value for key, value in options.items() if key != "elementwise_affine"}
    settings |= {"shift" if key == "bias" else key: value for key, value in parameters.items()}

    def activation(logits, bias=None, mask=None):
        return reference(logits, bias, mask, head_dim=head_dim, **settings)

    return activation


def make_activation(name, options, num_kernels, head_dim=DIM):
    """An activation with random parameters."""
    act = create_activation(name, num_kernels=num_kernels, head_dim=head_dim, **options)
    return prepared(act, 1.0)


def parameters_of(act):
    """The parameters of an activation under names that no input has."""
    return {f"act.{name}": p for name, p in act.named_parameters()}


def split(arrays):
    """Inputs, and parameters of the activation, from the arrays of `check`."""
    parameters = {key[4:]: a for key, a in arrays.items() if key.startswith("act.")}
    return {key: a for key, a in arrays.items() if not key.startswith("act.")}, parameters


DEPTHWISE = dict(depthwise="head", depthwise_channel="channel")  # mixer -> one table per ...
MIXERS = [*ACTIVATIONS, *DEPTHWISE]
MASKS = ("none", "plane", "images", "heads", "empty")


def make_mask(kind, b, h, n, m, seed=4):
    """Masks of the shapes that the library takes. In 'empty' an image and some rows select none."""
    shapes = dict(plane=(n, m), images=(b, 1, n, m), heads=(b, h, n, m), empty=(b, 1, n, m))
    if kind == "none":
        return None
    mask = np.random.default_rng(seed).random(shapes[kind]) < 0.6
    rows = np.arange(n)
    mask[..., rows, rows % m] = True
    if kind == "empty":
        mask[0] = False
        mask[1:, :, ::3] = False
    return mask


def as_tensor(mask):
    return None if mask is None else torch.from_numpy(mask)


def test_every_activation_has_a_formula():
    for name in ACTIVATIONS:
        assert callable(reference_of(name))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("name, options", SETTINGS, ids=SETTING_NAMES)
def test_activations(name, options, position, mask):
    b, h, n, m = 2, 3, 5, 7
    chosen = make_mask(mask, b, h, n, m)
    act = make_activation(name, options, m)
    inputs = {"logits": random(b, h, n, m, size=6)}
    if position:
        inputs["bias"] = random(h, n, m, seed=1)

    def reference(**arrays):
        arrays, parameters = split(arrays)
        return judge(name, options, DIM, **parameters)(**arrays, mask=chosen)

    check(lambda **t: act(**t, mask=as_tensor(chosen)), reference, inputs, parameters_of(act))
    weights = act(torch.from_numpy(inputs["logits"]), mask=as_tensor(chosen))
    if chosen is not None:
        assert not weights[~as_tensor(chosen).expand(b, h, n, m)].any()


@pytest.mark.parametrize("mask", ["none", "images"])
@pytest.mark.parametrize("dtype, unit", [(torch.half, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("name", ["ln", "ln_relu"])
def test_layernorm_statistics_are_not_kept_in_half_precision(name, dtype, unit, mask):
    b, h, n, m = 2, 2, 6, 400
    chosen = make_mask(mask, b, h, n, m)
    act = make_activation(name, dict(elementwise_affine=False), m)
    logits = torch.from_numpy(30 + random(b, h, n, m)).to(dtype)
    weights = act(logits, mask=as_tensor(chosen))
    expected = judge(name, {}, DIM)(logits.double().numpy(), mask=chosen)
    assert weights.dtype == dtype
    worst = np.abs(weights.double().numpy() - expected).max()
    assert worst < unit * max(1, np.abs(expected).max())


# --------------------------------------------------------------------------------------------------
# Attention: the definitions and the fast evaluations
# --------------------------------------------------------------------------------------------------


# What in the fast evaluations decides by size, with values that send small inputs the large ones' way;
# and the evaluations of the position term. A name that is gone fails here, it is not skipped.
THRESHOLDS = [(tiled, "TILE", 2**9), (tiled, "STORED", 0), (dispatch, "STORED", 0)]
POSITION_WAYS = dict(
    position_by_matrix=("head", "channel"),
    position_by_strips=("head",),
    position_by_fourier=("head",),
    position_by_fft=("head", "channel"),
    position_by_convolution=("head", "channel"),
)
HALF_UNITS = 1  # units in the last place that a half-precision result may be off
BATCH, HEADS, DIM = 2, 2, 4  # images, heads, channels of a head
GRID = (3, 4)


# --------------------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------------------


def random(*shape, seed=0, size=1.0):
    """Normal numbers, float64."""
    return size * np.random.default_rng([seed, *shape]).standard_normal(shape)


def assert_near(actual, expected, what, tol=TOL):
    """One shape, float64, and a difference below `tol` of the largest value (of 1 at least)."""
    assert actual.dtype == torch.float64, what
    actual = actual.detach().numpy()
    assert actual.shape == expected.shape, what
    assert np.isfinite(expected).all(), "the reference itself is not finite"
    assert np.isfinite(actual).all(), f"{what} not finite"
    limit = tol * max(1, np.abs(expected).max(initial=0))
    worst = np.abs(actual - expected).max(initial=0)
    assert worst <= limit, f"{what} differ by {worst:.1e}, allowed {limit:.1e}"


def check(ours, reference, inputs, parameters=None, tol=TOL):
    """Outputs, with and without gradients at work, and one slope for each input and parameter.

    `ours(**tensors)` against `reference(**arrays)`; `parameters` are those that `ours` has inside.
    """
    parameters = dict(parameters or {})
    arrays = inputs | {name: p.detach().numpy() for name, p in parameters.items()}
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in inputs.items()}
    actual = ours(**leaves)
    expected = reference(**arrays)
    assert_near(actual, expected, "outputs", tol)
    with torch.no_grad():
        assert_near(ours(**leaves), expected, "outputs without gradients", tol)
    cotangent = random(*expected.shape, seed=7)
    wanted = {**leaves, **parameters}
    grads = torch.autograd.grad(
        actual, list(wanted.values()), torch.from_numpy(cotangent), materialize_grads=True
    )
    for name, grad in zip(wanted, grads):
        grad = grad.numpy()
        direction = random(*grad.shape, seed=8)
        expected = ref.slope(reference, arrays, name, direction, cotangent)
        assert np.isfinite(grad).all(), f"gradient of {name} not finite"
        limit = tol * max(1, np.abs(grad * direction).sum(), abs(expected))
        worst = abs((grad * direction).sum() - expected)
        assert worst <= limit, f"gradients of {name} differ by {worst:.1e}, allowed {limit:.1e}"


def prepared(module, size=0.5):
    """Random parameters and statistics, float64, evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        nn.init.normal_(p, std=size, generator=generator)
    for name, b in module.named_buffers():
        if "running" in name:
            b.uniform_(0.5, 2, generator=generator)
    return module.double().eval()


def buffers(module):
    """The buffers of a state dict as arrays, to be added to a reference's state."""
    return {name: b.numpy() for name, b in module.named_buffers() if b is not None}


def check_module(module, reference, tol=TOL, **inputs):
    """A module against `reference(x, state)`, its parameters included."""
    constant = buffers(module)

    def from_state(x, **state):
        return reference(x, {**constant, **state})

    check(lambda x: module(x), from_state, inputs, module.named_parameters(), tol)


# --------------------------------------------------------------------------------------------------
# Activations and their settings
# --------------------------------------------------------------------------------------------------

TRIED = dict(  # option -> values; {} stands for the default
    temperature=[0.7, 3.0],
    scale=["head_dim", "sqrt_head_dim", "num_kernels", None],
    eps=[0.3],
    elementwise_affine=[False],
)


def reference_of(name):
    """The formula of an activation: its own `reference`, else the one of this name."""
    cls = ACTIVATIONS[name]
    if "reference" in vars(cls):
        return cls.reference
    if name not in ref.ACTIVATION_REFERENCES:
        raise AssertionError(f"{name} has no formula to be judged by; give {cls.__name__} its own "
                             "static method reference(logits, bias=None, mask=None, **settings)")
    return ref.ACTIVATION_REFERENCES[name]


def options_of(name):
    """Every option of an activation, one at a time, and none."""
    found = [{}]
    for option in inspect.signature(ACTIVATIONS[name].__init__).parameters:
        if option not in ("self", "num_kernels", "head_dim", "args", "kwargs"):
            found += [{option: value} for value in TRIED[option]]
    return found


SETTINGS = [(name, options) for name in ACTIVATIONS for options in options_of(name)]
SETTING_NAMES = [f"{name}-{options or 'default'}" for name, options in SETTINGS]


def judge(name, options, head_dim, **parameters):
    """The reference of an activation with settings: a function of (logits, bias, mask)."""
    reference = reference_of(name)
    settings = {key: value for key, value in options.items() if key != "elementwise_affine"}
    settings |= {"shift" if key == "bias" else key: value for key, value in parameters.items()}

    def activation(logits, bias=None, mask=None):
        return reference(logits, bias, mask, head_dim=head_dim, **settings)

    return activation


def make_activation(name, options, num_kernels, head_dim=DIM):
    """An activation with random parameters."""
    act = create_activation(name, num_kernels=num_kernels, head_dim=head_dim, **options)
    return prepared(act, 1.0)


def parameters_of(act):
    """The parameters of an activation under names that no input has."""
    return {f"act.{name}": p for name, p in act.named_parameters()}


def split(arrays):
    """Inputs, and parameters of the activation, from the arrays of `check`."""
    parameters = {key[4:]: a for key, a in arrays.items() if key.startswith("act.")}
    return {key: a for key, a in arrays.items() if not key.startswith("act.")}, parameters


DEPTHWISE = dict(depthwise="head", depthwise_channel="channel")  # mixer -> one table per ...
MIXERS = [*ACTIVATIONS, *DEPTHWISE]
MASKS = ("none", "plane", "images", "heads", "empty")


def make_mask(kind, b, h, n, m, seed=4):
    """Masks of the shapes that the library takes. In 'empty' an image and some rows select none."""
    shapes = dict(plane=(n, m), images=(b, 1, n, m), heads=(b, h, n, m), empty=(b, 1, n, m))
    if kind == "none":
        return None
    mask = np.random.default_rng(seed).random(shapes[kind]) < 0.6
    rows = np.arange(n)
    mask[..., rows, rows % m] = True
    if kind == "empty":
        mask[0] = False
        mask[1:, :, ::3] = False
    return mask


def as_tensor(mask):
    return None if mask is None else torch.from_numpy(mask)


def test_every_activation_has_a_formula():
    for name in ACTIVATIONS:
        assert callable(reference_of(name))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("name, options", SETTINGS, ids=SETTING_NAMES)
def test_activations(name, options, position, mask):
    b, h, n, m = 2, 3, 5, 7
    chosen = make_mask(mask, b, h, n, m)
    act = make_activation(name, options, m)
    inputs = {"logits": random(b, h, n, m, size=6)}
    if position:
        inputs["bias"] = random(h, n, m, seed=1)

    def reference(**arrays):
        arrays, parameters = split(arrays)
        return judge(name, options, DIM, **parameters)(**arrays, mask=chosen)

    check(lambda **t: act(**t, mask=as_tensor(chosen)), reference, inputs, parameters_of(act))
    weights = act(torch.from_numpy(inputs["logits"]), mask=as_tensor(chosen))
    if chosen is not None:
        assert not weights[~as_tensor(chosen).expand(b, h, n, m)].any()


@pytest.mark.parametrize("mask", ["none", "images"])
@pytest.mark.parametrize("dtype, unit", [(torch.half, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("name", ["ln", "ln_relu"])
def test_layernorm_statistics_are_not_kept_in_half_precision(name, dtype, unit, mask):
    b, h, n, m = 2, 2, 6, 400
    chosen = make_mask(mask, b, h, n, m)
    act = make_activation(name, dict(elementwise_affine=False), m)
    logits = torch.from_numpy(30 + random(b, h, n, m)).to(dtype)
    weights = act(logits, mask=as_tensor(chosen))
    expected = judge(name, {}, DIM)(logits.double().numpy(), mask=chosen)
    assert weights.dtype == dtype
    worst = np.abs(weights.double().numpy() - expected).max()
    assert worst < unit * max(1, np.abs(expected).max())


# --------------------------------------------------------------------------------------------------
# Attention: the definitions and the fast evaluations
# --------------------------------------------------------------------------------------------------


# What in the fast evaluations decides by size, with values that send small inputs the large ones' way;
# and the evaluations of the position term. A name that is gone fails here, it is not skipped.
THRESHOLDS = dict(SMALL=0, LOOK=0, TILE=2**9)
POSITION_WAYS = dict(
    by_matrix=("head", "channel"),
    by_fft=("head", "channel"),
    by_fourier_rows=("head",),
    by_convolution=("head", "channel"),
)
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

    check(ours, reference, inputs, parameters_of(act))


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

    check(ours, reference, inputs, parameters_of(act))


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


@pytest.mark.parametrize("term, tables", [(term, t) for term, kinds in POSITION_WAYS.items() for t in kinds])
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

    check(lambda v, table: getattr(relative_position, term)(v, table, grid), reference, inputs)


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

    check(ours, reference, inputs)
