"""Every activation, with every option, against its formula in NumPy: weights and gradients."""

import inspect
import math

import numpy as np
import pytest
import torch

import numpy_reference as ref
from reference_checks import *


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name, options", SETTINGS, ids=SETTING_NAMES)
def test_the_reference_that_a_class_brings_along(name, options, mask):
    """`Activation.reference` judges `vdc_equiv`; here it is judged by formulas written apart."""
    b, h, n, m = 2, 3, 5, 7
    act = make_activation(name, options, m)
    logits = random(b, h, n, m, size=6)
    bias = random(h, n, m, seed=1)
    chosen = make_mask(mask, b, h, n, m)
    parameters = {key: p.detach().numpy() for key, p in act.named_parameters()}
    expected = judge(name, options, DIM, **parameters)(logits, bias, chosen)
    actual = ACTIVATIONS[name].reference(logits, bias, chosen, **act.settings())
    np.testing.assert_allclose(actual, expected, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("name, options", SETTINGS, ids=SETTING_NAMES)
def test_the_reference_that_a_class_brings_along_can_be_differentiated(name, options):
    """By the complex step, as `vdc_equiv` does: a formula must not lose the imaginary part."""
    h, n, m = 3, 5, 7
    act = make_activation(name, options, m)
    arrays = dict(logits=random(h, n, m, size=6), bias=random(h, n, m, seed=1))
    parameters = {key: p.detach().numpy() for key, p in act.named_parameters()}
    cotangent = random(h, n, m, seed=2)

    def brought_along(logits, bias):
        return ACTIVATIONS[name].reference(logits, bias, **act.settings())

    for key in arrays:
        direction = random(h, n, m, seed=3)
        actual = ref.slope(brought_along, arrays, key, direction, cotangent)
        if name not in ref.ACTIVATION_REFERENCES:   # added later: its own formula, by central differences
            there, back = [brought_along(**arrays | {key: arrays[key] + step * direction}) for step in (1e-6, -1e-6)]
            assert math.isclose(actual, (cotangent * (there - back)).sum() / 2e-6, rel_tol=1e-5, abs_tol=1e-5), key
            continue
        expected = ref.slope(judge(name, options, DIM, **parameters), arrays, key, direction, cotangent)
        assert math.isclose(actual, expected, rel_tol=1e-11, abs_tol=1e-12), key


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


def test_the_complex_step_agrees_with_finite_differences():
    arrays = {name: random(1, 2, 3, 2, seed=i) for i, name in enumerate("qkv")}
    cotangent = random(1, 2, 3, 2, seed=5)
    for name in ref.ACTIVATION_REFERENCES:

        def function(q, k, v):
            act = lambda logits, bias, mask: ref.ACTIVATION_REFERENCES[name](
                logits, bias, mask, head_dim=2
            )
            return ref.attention(q, k, v, act)

        for key in "qkv":
            direction = random(1, 2, 3, 2, seed=6)
            slope = ref.slope(function, arrays, key, direction, cotangent)
            central = ref.central_slope(function, arrays, key, direction, cotangent)
            assert math.isclose(slope, central, rel_tol=1e-6, abs_tol=1e-7), (name, key)


def test_the_reference_imports_neither_torch_nor_the_library():
    source = inspect.getsource(ref)
    lines = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    roots = {line.split()[1].split(".")[0] for line in lines}
    assert roots == {"math", "itertools", "numpy", "scipy"}
