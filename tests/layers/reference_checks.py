"""The library next to the NumPy reference: how both are called, and how they are compared.

Gradients are judged without a second implementation of the backward pass: the reference is
differentiated by a complex step along one random direction for each input and parameter, which any
wrong entry of a gradient changes.
"""

import inspect

import numpy as np
import torch
from torch import nn

import numpy_reference as ref
from vitdynconv.fast import dispatch
from vitdynconv.layers.activations import ACTIVATIONS, create_activation
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.layers.depthwise import DepthwiseSelfAttention

TOL = 1e-12
BATCH, HEADS, DIM = 2, 2, 4  # images, heads, channels of a head
GRID = (3, 4)


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


SAID = {}  # what references said: (case, numbers it was asked about, question) -> answer


def asked_once(case, arrays, question, answer):
    """The answer of a reference, which several evaluations of one case ask the same.

    `case` says which reference with which settings; None: it is asked every time. Other numbers are another case.
    """
    if case is None:
        return answer()
    numbers = tuple((name, a.shape, a.tobytes()) for name, a in arrays.items())
    key = case, hash(numbers), question
    if key not in SAID:
        SAID[key] = answer()
    return SAID[key]


def check(ours, reference, inputs, parameters=None, tol=TOL, case=None):
    """Outputs, with and without gradients at work, and one slope for each input and parameter.

    `ours(**tensors)` against `reference(**arrays)`; `parameters` are those that `ours` has inside;
    `case` as for `asked_once`.
    """
    parameters = dict(parameters or {})
    arrays = inputs | {name: p.detach().numpy() for name, p in parameters.items()}
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in inputs.items()}
    actual = ours(**leaves)
    expected = asked_once(case, arrays, "outputs", lambda: reference(**arrays))
    assert_near(actual, expected, "outputs", tol)
    with torch.no_grad():
        assert_near(ours(**leaves), expected, "outputs without gradients", tol)
    cotangent = random(*expected.shape, seed=7)
    wanted = {**leaves, **parameters}
    grads = torch.autograd.grad(
        actual, list(wanted.values()), torch.from_numpy(cotangent), materialize_grads=True
    )
    for name, grad in zip(wanted, grads):
        check_gradient(grad.numpy(), reference, arrays, name, cotangent, tol, case)


def check_gradient(grad, reference, arrays, name, cotangent, tol=TOL, case=None):
    """The gradient with respect to `arrays[name]`, along one random direction.

    A reference that takes real numbers only is differentiated by central differences.
    """
    direction = random(*grad.shape, seed=8)

    def slope():
        try:
            return ref.slope(reference, arrays, name, direction, cotangent), tol
        except RealOnly:
            return ref.central_slope(reference, arrays, name, direction, cotangent), 1e-6

    expected, tol = asked_once(case, arrays, name, slope)
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


def check_module(module, reference, tol=TOL, case=None, **inputs):
    """A module against `reference(x, state)`, its parameters included; `case` as for `asked_once`."""
    constant = buffers(module)

    def from_state(x, **state):
        return reference(x, {**constant, **state})

    check(lambda x: module(x), from_state, inputs, module.named_parameters(), tol, case)


TRIED = dict(  # option -> values next to the default
    temperature=[0.7, 3.0],
    scale=["head_dim", "sqrt_head_dim", "num_kernels", None],
    eps=[0.3],
    elementwise_affine=[False],
)


class RealOnly(TypeError):
    """A formula was asked for the complex step and takes real numbers only."""


def own_reference(cls):
    """The formula that an activation brings along, for those that `numpy_reference` does not know."""

    def reference(logits, bias=None, mask=None, **settings):
        arrays = [logits, bias, *settings.values()]
        if any(np.iscomplexobj(a) for a in arrays):
            raise RealOnly(cls.__name__)
        known = inspect.signature(cls.formula).parameters
        settings = {key: value for key, value in settings.items() if key in known}
        return cls.reference(logits, bias, mask, **settings)

    return reference


def reference_of(name):
    """The formula of an activation: the one of this name in `numpy_reference`, else its own."""
    return ref.ACTIVATION_REFERENCES.get(name) or own_reference(ACTIVATIONS[name])


def options_of(name):
    """Every option of an activation, one at a time, and none."""
    found = [{}]
    for option in inspect.signature(ACTIVATIONS[name].__init__).parameters:
        if option not in ("self", "num_kernels", "head_dim", "args", "kwargs"):
            found += [{option: value} for value in TRIED.get(option, [])]
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


EVALUATIONS = ("definition", "fast")


def make_mixer(name, pos, grid, prefix, evaluation="definition", **settings):
    """A mixer of 6 channels in two heads: attention with an activation, or depth-wise."""
    settings = dict(pos=pos, grid_size=grid, num_prefix_tokens=prefix) | settings
    if name in DEPTHWISE:
        mixer = DepthwiseSelfAttention(6, 2, pos_per=DEPTHWISE[name], **settings)
    else:
        mixer = DynamicConvAttention(6, 2, activation=name, **settings)
    mixer = prepared(mixer)
    return dispatch.accelerate(mixer) if evaluation == "fast" else mixer


def mixer_reference(name, x, state, grid, prefix, mask, heads=2, options=None):
    """What `make_mixer` should compute."""
    if name in DEPTHWISE:
        return ref.depthwise_mixer(x, state, heads, grid, prefix, mask)
    return ref.attention_mixer(x, state, heads, reference_of(name), options, grid, prefix, mask)
