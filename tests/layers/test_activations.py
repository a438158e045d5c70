"Every activation in the registry: against its formula in NumPy, with masks, biases, gradients, half precision and other grids."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitdynconv.layers.activations import ACTIVATIONS, create_activation
from vitdynconv.layers.families.activation import FAMILIES, SCALES, Activation, register
from vitdynconv.layers.equivalence import attention, attention_as_convs
from vitdynconv.tools.testing import assert_equal

few = settings(max_examples=25, deadline=None, derandomize=True)
every = pytest.mark.parametrize('name', list(ACTIVATIONS))
half = pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])


def normal(*shape, seed=0): return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed=0):
    "About 60% of the kernels, at least one for each position but the first, which selects none."
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < .6
    mask[..., 0] = True
    mask[..., 0, :] = False
    return mask


def make(name, m, d=16, **options):
    torch.manual_seed(1)
    act = create_activation(name, num_kernels=m, head_dim=d, **options).double()
    for p in act.parameters(): nn.init.normal_(p)
    return act


def by_formula(act, logits, bias=None, mask=None):
    arrays = [None if t is None else t.detach().double().numpy() for t in (logits, bias)]
    return torch.from_numpy(act.reference(*arrays, None if mask is None else mask.numpy(), **act.settings()))


@every
@few
@given(b=st.integers(1, 3), n=st.integers(1, 5), m=st.integers(1, 9), biased=st.booleans(), masked=st.booleans(), size=st.sampled_from([.1, 4., 40.]), seed=st.integers(0, 99))
def test_formula(name, b, n, m, biased, masked, size, seed):
    act, logits = make(name, m), size * normal(b, n, m, seed=seed)
    bias = normal(n, m, seed=seed + 1) if biased else None
    mask = random_mask(b, n, m, seed=seed) if masked else None
    with torch.no_grad(): out = act(logits, bias=bias, mask=mask)
    assert_equal(out, by_formula(act, logits, bias, mask), tol=1e-11 * max(1, size ** 2))


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('name', [name for name, c in ACTIVATIONS.items() if hasattr(c, 'scale')])
def test_formula_with_every_scale(name, scale):
    act, logits, mask = make(name, 7, scale=scale), 5 * normal(3, 4, 7), random_mask(3, 4, 7)
    for m in (None, mask): assert_equal(act(logits, mask=m), by_formula(act, logits, None, m), tol=1e-11)


@pytest.mark.parametrize('name, options', [('softmax', dict(temperature=.7)), ('sparsemax', dict(temperature=3.)), ('softmax_plus_one', dict(temperature=2.)),
                                           ('ln', dict(eps=.3)), ('ln_relu', dict(elementwise_affine=False))])
def test_formula_with_options(name, options):
    act, logits, mask = make(name, 7, **options), 2 * normal(3, 4, 7), random_mask(3, 4, 7)
    for m in (None, mask): assert_equal(act(logits, mask=m).detach(), by_formula(act, logits, None, m))


@every
def test_a_wrong_formula_is_seen(name):
    "The check that every proof relies on must be able to fail: another class's answer is not this one's."
    logits = 40 * normal(3, 4, 7)          # large enough for ReLU6 to bend
    for other in ACTIVATIONS:
        if other == name: continue
        act, wrong = make(name, 7, d=64), make(other, 7, d=64)
        assert (wrong(logits) - by_formula(act, logits)).abs().max() > 1e-6, other


@every
def test_a_position_that_selects_nothing_gets_zero(name):
    act = make(name, 5)
    logits, bias = normal(2, 3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[0] = False                       # an image that is all padding
    mask[1, 1] = False
    out = act(logits, bias=bias, mask=mask)
    assert (out[0] == 0).all() and (out[1, 1] == 0).all() and (out[1, 0] != 0).any()
    grads = torch.autograd.grad((out + 1).square().sum(), [logits, bias, *act.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0] == 0).all() and (grads[0][1, 1] == 0).all() and (grads[0][1, 0] != 0).any()
    alone = act(logits[1:], bias=bias, mask=torch.ones(1, 3, 5, dtype=torch.bool))
    assert torch.equal(out[1, [0, 2]], alone[0, [0, 2]])


@every
@half
def test_a_position_that_selects_nothing_in_half_precision(name, dtype):
    act = make(name, 5).to(dtype)
    logits = normal(2, 3, 5).to(dtype).requires_grad_()
    out = act(logits, mask=torch.zeros(3, 5, dtype=torch.bool))
    out.sum().backward()
    assert (out == 0).all() and (logits.grad == 0).all() and out.dtype == dtype


@pytest.mark.parametrize('name', [name for name, c in ACTIVATIONS.items() if c.bias_in_logits and c.communication])
def test_an_additive_mask_that_forbids_everything(name):
    "Minus infinity in every place of a row is a row that selects nothing, too."
    act, logits = make(name, 5), normal(2, 3, 5).requires_grad_()
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[0, 0] = False
    additive = torch.zeros(2, 3, 5, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    out = act(logits, bias=additive)
    assert torch.equal(out, act(logits, mask=mask)) and (out[0, 0] == 0).all()
    grad, = torch.autograd.grad(out.square().sum(), logits)
    assert grad.isfinite().all()


@every
def test_gradients(name):
    act, mask = make(name, 5, d=4), random_mask(3, 5)
    logits, bias = normal(2, 3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, b: act(s, bias=b, mask=mask), (logits, bias))
    assert torch.autograd.gradcheck(act, logits)


@every
def test_left_out_kernels_do_not_exist(name):
    act, logits, kept = make(name, 7), normal(3, 7), torch.tensor([True, False, True, True, False, True, True])
    out = act(logits, mask=kept)
    assert (out[:, ~kept] == 0).all()
    for huge in (1e4, -1e4): assert torch.equal(act(logits.masked_fill(~kept, huge), mask=kept), out)
    small = create_activation(name, num_kernels=5, head_dim=16).double()
    if list(act.parameters()): small.load_state_dict({key: w[kept] for key, w in act.state_dict().items()})
    assert_equal(out[:, kept], small(logits[:, kept]))


@every
@half
def test_half_precision(name, dtype):
    q, k, v = [normal(1, 1, 64, 32, seed=s).float() for s in range(3)]
    exact = attention(q, k, v, name)
    out = attention(q.to(dtype), k.to(dtype), v.to(dtype), name)
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert (out.float() - exact).norm() < (4e-3 if dtype == torch.half else 3e-2) * exact.norm()


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('name', [name for name, c in ACTIVATIONS.items() if c.family == 'layernorm'])
@half
def test_statistics_in_float32(name, masked, dtype):
    "4096 logits around 100: their sum and the sum of their squares lie outside float16, and outside bfloat16's precision."
    act = create_activation(name, num_kernels=4096)
    logits = (100 + 8 * normal(3, 4096)).to(dtype)
    mask = torch.rand(3, 4096, generator=torch.Generator().manual_seed(1)) < .7 if masked else None
    expected = by_formula(act, logits, None, mask)
    out = copy.deepcopy(act).to(dtype)(logits, mask=mask)
    assert ((out.double() - expected).norm() / expected.norm()).item() < (1e-3 if dtype == torch.half else 8e-3)


@every
def test_many_kernels_of_large_logits_stay_exact(name):
    act, logits, mask = make(name, 50), 1e3 * normal(4, 50), random_mask(4, 50)
    expected = by_formula(act, logits, None, mask)
    assert_equal(act(logits, mask=mask), expected, 1e-12 * max(1., expected.abs().max().item()))


@every
def test_what_a_class_says_of_itself(name):
    c = ACTIVATIONS[name]
    assert c.family in FAMILIES and 'family' in vars(c) and c.name == name and c.__doc__
    act, logits = make(name, 6), 4 * normal(6)
    J = torch.autograd.functional.jacobian(act, logits)
    communicates = (J - J.diagonal().diag()).abs().max() > 1e-8
    assert communicates == c.communication
    linear = torch.allclose(act(2 * logits), 2 * act(logits)) and torch.allclose(act(-logits), -act(logits))
    assert linear == (c.family == 'linear')
    if c.family == 'pointwise': assert_equal(act.elementwise(logits, 6), act(logits))
    bias = normal(6, seed=3)
    assert torch.allclose(act(logits, bias=bias), act(logits) + bias) != c.bias_in_logits


@every
def test_per_kernel_parameters_move_with_the_grid(name):
    act = make(name, 6)
    moved = act.resized_parameters(lambda p: p.repeat(2, *[1] * (p.ndim - 1)))
    assert moved.keys() == dict(act.named_parameters()).keys()
    assert all(p.shape[0] == 12 for p in moved.values())


@few
@given(name=st.sampled_from(list(ACTIVATIONS)), b=st.integers(0, 3), h=st.integers(1, 3), n=st.integers(1, 5), m=st.integers(1, 6), d=st.integers(1, 5), bias=st.booleans(),
       mask=st.sampled_from([None, 'shared', 'each']))
def test_attention_is_convolutions(name, b, h, n, m, d, bias, mask):
    q, k, v = normal(b, h, n, d), normal(b, h, m, d, seed=1), normal(b, h, m, d, seed=2)
    bias = normal(h, n, m, seed=3) if bias else None
    mask = {None: None, 'shared': random_mask(n, m), 'each': random_mask(b, h, n, m)}[mask]
    act = make(name, m, d=d)
    assert_equal(attention(q, k, v, act, bias, mask), attention_as_convs(q, k, v, act, bias, mask))


@few
@given(name=st.sampled_from(list(ACTIVATIONS)), h=st.integers(1, 3), n=st.integers(1, 6), d=st.integers(1, 5))
def test_order_of_kernels_does_not_matter_without_position(name, h, n, d):
    q, k, v = normal(1, h, 4, d), normal(1, h, n, d, seed=1), normal(1, h, n, d, seed=2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert_equal(attention(q, k[:, :, order], v[:, :, order], name), attention(q, k, v, name))


def test_register_refuses_a_name_twice_and_an_unknown_family():
    class Mine(Activation): "Nothing in particular."
    with pytest.raises(ValueError, match=r"'relu' belongs to vitdynconv.layers.families.later.ReLU.*ACTIVATIONS.pop\('relu'\)"): register('relu')(Mine)
    assert ACTIVATIONS['relu'].__name__ == 'ReLU'
    class Odd(Activation): family = 'odd'
    with pytest.raises(ValueError, match="family='odd'.*fused"): register('mine')(Odd)
    assert 'mine' not in ACTIVATIONS
    try:
        register('mine')(Mine)
        register('mine')(Mine)              # the same cell run again
    finally: ACTIVATIONS.pop('mine')


def test_a_child_does_not_inherit_a_promise():
    class Child(ACTIVATIONS['scaling']):
        def forward(self, logits, bias=None, mask=None): return torch.sin(logits)
    assert ACTIVATIONS['scaling'].family == 'linear' and Child.family == 'rows'


@pytest.mark.parametrize('wrong, words', [
    (lambda: create_activation('lnrelu'), ['lnrelu', 'scaling_relu', "did you mean 'ln_relu'"]),
    (lambda: create_activation('softmax', head_dim=4, temprature=1), ['temprature']),
    (lambda: create_activation('softmax', head_dim=4, temperature=0), ['temperature=0']),
    (lambda: create_activation('ln', head_dim=4), ['num_kernels']),
    (lambda: create_activation('ln', num_kernels=4)(torch.zeros(2, 5)), ['weights for 4', 'sees 5']),
    (lambda: create_activation('scaling'), ['head_dim']),
    (lambda: create_activation('scaling', head_dim=4, scale='d'), ["'d'", 'sqrt_head_dim']),
])
def test_bad_input_is_named(wrong, words):
    with pytest.raises(ValueError) as e: wrong()
    for word in words: assert word in str(e.value)
    assert '\n' not in str(e.value)


def test_references_use_no_torch():
    for c in ACTIVATIONS.values():
        out = c.formula(np.array([1., -2., 3.]), np.zeros(3), **(dict(head_dim=4) if c.family != 'layernorm' else {}))
        assert type(out) is np.ndarray and out.dtype == np.float64
