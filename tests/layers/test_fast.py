"Fast evaluations as a user meets them: whole models, precisions, exports, kernels, and the benchmark command."
import copy, csv, os, subprocess, sys

import pytest
import torch
from torch import nn

from vitdynconv import bench, timing
from vitdynconv.suites import core
from vitdynconv.fast import dispatch as fast
from vitdynconv.layers.activations import ACTIVATIONS, create_activation
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.tools.testing import difference
from vitdynconv.layers.depthwise import DepthwiseSelfAttention, depthwise_attention
from vitdynconv.layers.equivalence import attention
from vitdynconv.fast.dispatch import accelerate, dynamic_conv_attention, fast_depthwise_attention
from vitdynconv.fast.relative_position import position_by_fft, position_by_fourier
from vitdynconv.models.registry import create_model
from vitdynconv.layers.position import RelativePosition


def bank(b, h, n, d, dtype=torch.float64, seed=0):
    "Queries, keys and values as a projection leaves them: views into one tensor."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, n, 3, h, d, generator=generator, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)


def random_position(grid, tables, prefix=0, dtype=torch.float64):
    table = torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1), tables, dtype=dtype, generator=torch.Generator().manual_seed(3)) / 50
    return RelativePosition(nn.Parameter(table), grid, prefix)


def random_activation(name, n, d):
    torch.manual_seed(1)
    act = create_activation(name, num_kernels=n, head_dim=d)
    for p in act.parameters(): nn.init.normal_(p)
    return act


# The definition, on sizes that take the ways of large ones

@pytest.mark.parametrize("side", [14, 17])  # logits that are stored for the backward pass, and tiles
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_maps_in_float64(name, side):
    n = side ** 2 + 1
    q, k, v = bank(1, 2, n, 16)
    act, position = random_activation(name, n, 16).double(), random_position((side, side), 2, 1)
    params = [(p, p) for p in [*act.parameters(), position.table]]
    diff = difference(lambda *x: dynamic_conv_attention(*x, act, position=position), lambda *x: attention(*x, act, position=position), q, k, v, params=params)
    assert max(diff) < 1e-11  # sums over 197 kernels, gradients of size ten and more


@pytest.mark.parametrize("name", ["softmax", "scaling", "scaling_relu", "ln", "ln_relu", "gelu"])
@pytest.mark.parametrize("n", [197, 784])
def test_float32_stays_as_close_as_the_definition(name, n):
    "These sizes go through oneDNN, forward and backward."
    act, inputs = random_activation(name, n, 64), [t.detach().requires_grad_() for t in bank(1, 2, n, 64, torch.float32)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    results = {}
    for key, f, x, a in [("fast", dynamic_conv_attention, inputs, act), ("literal", attention, inputs, act), ("exact", attention, exact_inputs, copy.deepcopy(act).double())]:
        y = f(*x, a)
        results[key] = [y, *torch.autograd.grad(y, [*x, *a.parameters()], torch.ones_like(y))]
    for quick, literal, exact in zip(*results.values()):
        error = lambda t: ((t.double() - exact).norm() / exact.norm()).item()
        own = quick.ndim == 1  # LayerNorm's parameters: oneDNN and torch sum their gradients over all positions in another order
        assert error(quick) < 1.5 * error(literal) + (5e-6 if own else 2e-7)


@pytest.mark.parametrize("name", ["softmax", "scaling", "scaling_relu", "ln", "ln_relu", "sigmoid"])
def test_autocast(name):
    q, k, v = bank(2, 2, 150, 32, torch.float32)
    act = random_activation(name, 150, 32)
    exact = attention(q, k, v, act)
    with torch.autocast("cpu", torch.bfloat16): y = dynamic_conv_attention(q, k, v, act)
    assert y.dtype == torch.bfloat16
    assert ((y - exact).norm() / exact.norm()).item() < 3e-2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_autocast_in_training_windows(name, masked):
    "Few logits are stored for the backward pass; position and parameters stay in float32. Output and gradients are those of float32."
    q, k, v = [t.detach().requires_grad_() for t in bank(2, 2, 49, 32, torch.float32)]
    act, position = random_activation(name, 49, 32), random_position((7, 7), 2, dtype=torch.float32)
    mask = torch.rand(2, 1, 49, 49, generator=torch.Generator().manual_seed(2)) < .7 if masked else None
    exact = attention(q, k, v, act, None, mask, position)
    with torch.autocast("cpu", torch.bfloat16): y = dynamic_conv_attention(q, k, v, act, None, mask, position)
    assert y.dtype == torch.bfloat16 and ((y - exact).norm() / exact.norm()).item() < 5e-2
    inputs, limit = [q, k, v, position.table, *act.parameters()], .25 if name == "sparsemax" else 5e-2  # sparsemax's slope jumps where a kernel joins
    for g, expected in zip(*(torch.autograd.grad(out, inputs, 2 * exact.detach().to(out.dtype)) for out in (y, exact))):
        assert g.dtype == torch.float32 and ((g - expected).norm() / expected.norm()).item() < limit


def test_other_modules_are_evaluated_by_the_definition():
    class Mine(nn.Module):
        def forward(self, logits, bias=None, mask=None): return torch.tanh(logits) * logits.shape[-1] ** -.5
    class Overridden(ACTIVATIONS["scaling_relu"]):
        def forward(self, logits, bias=None, mask=None): return torch.sin(logits)
    q, k, v = bank(1, 2, 200, 8)
    for act in (Mine(), Overridden(head_dim=8)): assert torch.equal(dynamic_conv_attention(q, k, v, act), attention(q, k, v, act))


def test_leading_axes_and_names():
    q, k, v = bank(2, 3, 10, 4)
    expected = attention(q, k, v, "scaling_relu")
    assert torch.allclose(dynamic_conv_attention(q, k, v, "scaling_relu"), expected, rtol=0, atol=1e-12)
    assert torch.allclose(dynamic_conv_attention(q[0], k[0], v[0], "scaling_relu"), expected[0], rtol=0, atol=1e-12)
    five = [t.unflatten(0, (2, 1)) for t in (q, k, v)]
    assert torch.allclose(dynamic_conv_attention(*five, "scaling_relu"), expected.unflatten(0, (2, 1)), rtol=0, atol=1e-12)


def test_wrong_shapes_are_refused():
    q, k, v = bank(1, 2, 10, 4)
    with pytest.raises(ValueError, match="grid of 3 x 4"): dynamic_conv_attention(q, k, v, "scaling", position=random_position((3, 4), 2))
    with pytest.raises(ValueError, match="weights for 9 kernels"): dynamic_conv_attention(q, k, v, create_activation("ln", num_kernels=9).double())
    with pytest.raises(ValueError, match="keys .* and values"): dynamic_conv_attention(q, k, v[:, :, 1:], "scaling")


def test_second_derivatives_are_refused_not_wrong():
    q, k, v = [t.requires_grad_() for t in bank(1, 2, 300, 8)]
    for name in ("scaling_relu", "gelu"):
        g, = torch.autograd.grad(dynamic_conv_attention(q, k, v, name).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()


# Whole models

@pytest.mark.parametrize("settings", [
    dict(activation="softmax"), dict(activation="scaling", pos="rel"), dict(activation="ln_relu", pos="rel", class_token=False, global_pool="avg"), dict(kernel="depthwise", pos="rel")], ids=str)
def test_fast_models_compute_what_literal_ones_do(settings):
    torch.manual_seed(0)
    quick = create_model("deit_tiny_patch16_224", num_classes=5, depth=2, img_size=96, **settings)
    slow, definition = copy.deepcopy(quick), {dynamic_conv_attention: attention, fast_depthwise_attention: depthwise_attention}
    for block in slow.blocks: block.attn.backend = definition[block.attn.backend]
    assert slow.state_dict().keys() == quick.state_dict().keys()
    x = torch.randn(2, 3, 96, 96)
    assert max(difference(quick.double(), slow.double(), x.double(), params=zip(quick.parameters(), slow.parameters()))) < 1e-8  # gradients of the first layer are large
    quick.float(), slow.float()
    assert torch.allclose(quick(x), slow(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["pair", "depthwise"])
def test_swin_with_shifted_windows(kind):
    torch.manual_seed(0)
    options = dict(kernel="depthwise", pos_per="channel") if kind == "depthwise" else dict(activation="ln_relu")
    quick = create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=112, depths=(2, 2), num_heads=(2, 4), embed_dim=16, drop_path_rate=0., **options).double()
    slow, definition = copy.deepcopy(quick), {dynamic_conv_attention: attention, fast_depthwise_attention: depthwise_attention}
    for layer in slow.layers:
        for block in layer.blocks: block.attn.backend = definition[block.attn.backend]
    x = torch.randn(1, 3, 112, 112, dtype=torch.float64)
    for mode in (True, False):
        quick.train(mode), slow.train(mode)
        assert max(difference(quick, slow, x, params=zip(quick.parameters(), slow.parameters()))) < 1e-10
        with torch.no_grad(): assert torch.allclose(quick(x), slow(x), rtol=0, atol=1e-12)


# Memory and length

@pytest.mark.parametrize("name", ["scaling_relu", "ln_relu"])
def test_memory_is_linear(name):
    from vitdynconv.models.cost import peak_memory
    def held(n):
        q, k, v = [t.detach().requires_grad_() for t in bank(1, 1, n, 16, torch.float32)]
        act = create_activation(name, num_kernels=n, head_dim=16)
        return peak_memory(lambda: dynamic_conv_attention(q, k, v, act).sum().backward())
    assert held(6272) < 4.5 * held(1568) and held(6272) < 6272 ** 2 * 4 / 5


def test_position_of_a_large_map():
    v, table = bank(1, 1, 12544, 4, torch.float32)[0], torch.randn(223 ** 2, 1, generator=torch.Generator().manual_seed(0))
    rows, pixels = position_by_fourier(v, table, (112, 112)), position_by_fft(v, table, (112, 112))
    assert ((rows - pixels).norm() / pixels.norm()).item() < 1e-5


# Recording

@pytest.mark.parametrize("make", [*[lambda name=name: DynamicConvAttention(24, 3, activation=name, pos="rel", grid_size=4, num_prefix_tokens=1) for name in ("softmax", "scaling", "scaling_relu", "ln_relu")],
                                  lambda: DepthwiseSelfAttention(24, 3, pos="rel", grid_size=4, num_prefix_tokens=1)], ids=["softmax", "scaling", "scaling_relu", "ln_relu", "depthwise"])
def test_onnx(make, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    mixer, (x, other) = accelerate(make()).eval(), torch.randn(2, 2, 17, 24)
    torch.onnx.export(mixer, (x,), tmp_path/"mixer.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/"mixer.onnx")
    y, = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert torch.allclose(torch.from_numpy(y), mixer(other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "scaling", "ln_relu"])
def test_inductor(name):
    torch.manual_seed(0)
    mixer, x = accelerate(DynamicConvAttention(24, 3, activation=name, pos="rel", grid_size=4)), torch.randn(2, 16, 24)
    assert max(difference(torch.compile(mixer), mixer, x, params=[(p, p) for p in mixer.parameters()])) < 1e-4


def test_other_ways_of_copying_a_model(tmp_path):
    mixer, x = accelerate(DynamicConvAttention(24, 3, activation="ln_relu", num_kernels=9)), torch.randn(1, 9, 24)
    torch.save(mixer, tmp_path/"mixer.pt")
    for other in (copy.deepcopy(mixer), torch.load(tmp_path/"mixer.pt", weights_only=False), torch.jit.trace(mixer, (x,))):
        assert torch.allclose(other(x), mixer(x), rtol=1e-5, atol=1e-6)


# The GPU's kernels, on a CPU

KERNELS = """
import torch
from vitdynconv.tools.testing import difference
from vitdynconv.fast.dispatch import dynamic_conv_attention
from vitdynconv.layers.activations import create_activation
from vitdynconv.layers.equivalence import attention
torch.manual_seed(0)
q, k, v = torch.randn(1, 2, 70, 24), torch.randn(1, 2, 65, 24), torch.randn(1, 2, 65, 24)
for name in ('scaling_relu', 'relu', 'ln_relu'):
    act = create_activation(name, num_kernels=65, head_dim=24)
    for p in act.parameters(): torch.nn.init.normal_(p)
    params = [(p, p) for p in act.parameters()]
    diff = difference(lambda *x: dynamic_conv_attention(*x, act), lambda *x: attention(*x, act), q, k, v, params=params)
    assert diff.outputs < 1e-4 and diff.gradients < 1e-3, (name, diff)
"""


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", KERNELS], env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_triton_is_not_needed_on_a_cpu():
    code = "import sys; sys.modules['triton'] = None; import torch, vitdynconv.fast.dispatch as f; q = torch.randn(1, 1, 200, 8); f.dynamic_conv_attention(q, q, q, 'scaling_relu')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# Faults that were found, each with its kind

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_positions_that_select_nothing_and_empty_batches(name, masked):
    "Zero, forward and backward, and other images untouched; an empty batch stays empty."
    for n in (9, 300):
        q, k, v = [t.requires_grad_() for t in bank(2, 2, n, 4)]
        act, mask = random_activation(name, n, 4).double(), torch.rand(2, 1, n, n) < .6
        mask[0], mask[1, :, 3] = False, False
        if masked:
            y = dynamic_conv_attention(q, k, v, act, None, mask)
            assert (y[0] == 0).all() and (y[1, :, 3] == 0).all()
            grads = torch.autograd.grad(y.sum(), (q, k, v, *act.parameters()), allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in grads) and (grads[0][0] == 0).all()
            alone = dynamic_conv_attention(q[1:], k[1:], v[1:], act, None, mask[1:])
            assert torch.allclose(y[1:], alone, rtol=0, atol=1e-13)
        none = [t[:0].detach().requires_grad_() for t in (q, k, v)]
        y = dynamic_conv_attention(*none, act, None, mask[:0] if masked else None)
        assert y.shape == none[0].shape and torch.autograd.grad(y.sum(), none[0])[0].shape == y.shape


@pytest.mark.parametrize("per_channel", [False, True])
def test_empty_batches_and_rows_of_depthwise_attention(per_channel):
    for grid in ((7, 7), (14, 14)):
        n = grid[0] * grid[1]
        q, k, _ = [t.requires_grad_() for t in bank(2, 2, n, 3)]
        position, mask = random_position(grid, 6 if per_channel else 2), torch.rand(2, 1, n, n) < .5
        mask[:, :, 5] = False
        y = fast_depthwise_attention(q, k, mask=mask, position=position)
        assert (y[:, :, 5] == 0).all() and torch.autograd.grad(y.sum(), k)[0].isfinite().all()
        for m in (None, mask[:0]): assert fast_depthwise_attention(q[:0], k[:0], mask=m, position=position).shape == (0, 2, n, 3)


SIZES = (.01, 0), (1, 0), (1, 3), (8, 0), (1, 5)    # factor and common mean


def value_and_gradients(f, tensors, act, mask, up):
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = f(*tensors, act, mask=mask)
    return [t.double() for t in (y.detach(), *torch.autograd.grad(y, tensors, up.to(y.dtype)))]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16], ids=str)
def test_half_precision_is_no_worse_than_the_definition(name, masked, dtype):
    "4096 kernels, small and large inputs, forward and backward, judged by float64."
    n, d = 4096, 64
    for size, mean in SIZES:
        generator = torch.Generator().manual_seed(0)
        q, k, v = [(torch.randn(1, 1, rows, d, generator=generator) + mean) * size for rows in (32, n, n)]
        if mean == 5: q = q - 5 * size          # K'V exceeds float16, the result does not
        mask = torch.rand(1, 1, 32, n, generator=generator) < .5 if masked else None
        up = torch.randn(1, 1, 32, d, generator=generator)
        low, act = [t.to(dtype) for t in (q, k, v)], create_activation(name, num_kernels=n, head_dim=d)
        exact = value_and_gradients(attention, [t.double() for t in low], copy.deepcopy(act).double(), mask, up)
        found = [value_and_gradients(f, low, copy.deepcopy(act).to(dtype), mask, up) for f in (dynamic_conv_attention, attention)]
        for what, right, fast_one, slow_one in zip(("y", "dq", "dk", "dv"), exact, *found):
            ours, theirs = [((t - right).norm() / right.norm().clamp(min=1e-30)).nan_to_num(torch.inf, torch.inf).item() for t in (fast_one, slow_one)]
            assert ours <= 1.1 * theirs + 1e-4, (what, size, mean)
        with torch.no_grad(): y = dynamic_conv_attention(*low, copy.deepcopy(act).to(dtype), mask=mask)
        ours, theirs = [((t.double() - exact[0]).norm() / exact[0].norm().clamp(min=1e-30)).nan_to_num(torch.inf, torch.inf).item() for t in (y, found[1][0])]
        assert ours <= 1.1 * theirs + 1e-4, ("inference", size, mean)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16], ids=str)
def test_depthwise_of_half_precision_is_no_worse_than_its_definition(dtype):
    n, d, grid = 4096, 2, (64, 64)
    for size, mean in SIZES:
        generator = torch.Generator().manual_seed(0)
        q, k = [((torch.randn(1, 1, n, d, generator=generator) + mean) * size).to(dtype) for _ in range(2)]
        position = random_position(grid, 1, dtype=dtype)
        wide = random_position(grid, 1)
        wide.table.data = position.table.data.double()
        with torch.no_grad():
            exact = depthwise_attention(q.double(), k.double(), position=wide)
            ours, theirs = [((f(q, k, position=position).double() - exact).norm() / exact.norm()).nan_to_num(torch.inf, torch.inf).item() for f in (fast_depthwise_attention, depthwise_attention)]
        assert ours <= 1.1 * theirs + 1e-4, (size, mean)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0, 60])
def test_masked_means_of_half_precision_add_up_in_float32(dtype, mean):
    "2048 of 4096 kernels with a large common mean: their sum is no number in float16, their mean is."
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 8, 3, generator=generator).to(dtype), (torch.randn(1, 2, 4096, 3, generator=generator) + mean).to(dtype)
    mask = torch.rand(1, 1, 8, 4096, generator=generator) < .5
    exact = depthwise_attention(q.double(), k.double(), mask=mask)
    for f in depthwise_attention, fast_depthwise_attention:
        y = f(q, k, mask=mask)
        assert y.dtype == dtype and (y - exact).norm() < .5 * torch.finfo(dtype).eps * exact.norm()


def test_masks_of_one_shape_are_told_apart():
    "The patterns of a mask are remembered; another mask of the same shape has its own."
    q, k, _ = bank(4, 2, 16, 3)
    position = random_position((4, 4), 6)
    for seed in (0, 1):
        mask = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) < .5
        for _ in range(2):
            fast = fast_depthwise_attention(q, k, mask=mask, position=position)
            assert torch.allclose(fast, depthwise_attention(q, k, mask=mask, position=position), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_gradients_of_tiles_in_half_precision(dtype):
    "Sums over tiles are kept in float32: gradients are no worse than the definition's."
    low = [t.detach().to(dtype) for t in bank(1, 1, 2048, 16, torch.float32)]
    def gradients(f, *inputs):
        inputs = [t.requires_grad_() for t in inputs]
        y = f(*inputs, "scaling_relu")
        return torch.autograd.grad(y, inputs, torch.ones_like(y))
    exact = gradients(attention, *[t.double() for t in low])
    for fast, literal, g in zip(gradients(dynamic_conv_attention, *low), gradients(attention, *low), exact):
        assert (fast.double() - g).norm() <= 1.1 * (literal.double() - g).norm()


def test_backward_inside_autocast():
    "The tiles are computed again in the backward pass, wherever that is started."
    q, k, v = [t.detach().requires_grad_() for t in bank(1, 2, 300, 16, torch.float32)]
    expected = torch.autograd.grad(dynamic_conv_attention(q, k, v, "scaling_relu").sum(), q)[0]
    y = dynamic_conv_attention(q, k, v, "scaling_relu").sum()
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(torch.autograd.grad(y, q)[0], expected)


@pytest.mark.parametrize("name", ["ln", "ln_relu"])
def test_functional_call_trains_the_parameters_it_is_given(name):
    "In tiles the activation is evaluated again in the backward pass, when the module has its own parameters back."
    n = 200
    mixer = accelerate(DynamicConvAttention(16, 2, activation=name, num_kernels=n)).double()
    other = {key: p.detach() + torch.randn_like(p) / 9 for key, p in mixer.named_parameters()}
    other = {key: p.requires_grad_() for key, p in other.items()}
    x = torch.randn(1, n, 16, dtype=torch.float64)
    mask = torch.rand(n, n) < .8
    quick = torch.func.functional_call(mixer, other, (x, mask))
    mixer.backend = attention
    slow = torch.func.functional_call(mixer, other, (x, mask))
    for a, b in zip(*[torch.autograd.grad(y.sum(), list(other.values())) for y in (quick, slow)]): assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_counters_see_timms_products():
    import timm
    from torch.utils.flop_counter import FlopCounterMode
    def flops(model, *size):
        with FlopCounterMode(display=False) as counter, torch.no_grad(): model.eval()(torch.randn(1, 3, *size))
        return counter.get_total_flops()
    base = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=64)
    assert flops(create_model("deit_tiny_patch16_224", depth=2, img_size=64), 64, 64) == flops(base, 64, 64)
    same_products = create_model("deit_tiny_patch16_224", "scaling_relu", depth=2, img_size=64)
    literal = copy.deepcopy(same_products)
    for m in literal.modules():
        if hasattr(m, "backend"): m.backend = attention
    assert flops(same_products, 64, 64) == flops(literal, 64, 64)
    assert {type(m) for m in same_products.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize("name", ["softmax", "scaling", "scaling_relu", "ln", "ln_relu", "gelu", "sparsemax", "depthwise"])
def test_traces_take_other_batches_and_meta_tensors(name):
    options = dict(pos="rel", grid_size=4)
    mixer = DepthwiseSelfAttention(24, 3, **options) if name == "depthwise" else DynamicConvAttention(24, 3, activation=name, **options)
    mixer, other = accelerate(mixer).eval(), torch.randn(5, 16, 24)
    traced = torch.jit.trace(mixer, (torch.randn(2, 16, 24),), check_trace=False)
    assert torch.allclose(traced(other), mixer(other), rtol=1e-4, atol=1e-5)
    if name == "depthwise": torch.export.export(mixer, (other, torch.ones(16, 16, dtype=torch.bool)))
    mask = torch.ones(16, 16, dtype=torch.bool)
    for m in (None, mask): assert copy.deepcopy(mixer).to("meta")(other.to("meta"), None if m is None else m.to("meta")).shape == other.shape


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["scaling_relu", "ln_relu", "scaling", "ln"])
def test_on_a_gpu(name):
    q, k, v = [t.cuda() for t in bank(2, 3, 300, 64, torch.float32)]
    act = random_activation(name, 300, 64).cuda()
    parameters = [(p, p) for p in act.parameters()]
    diff = difference(lambda *x: dynamic_conv_attention(*x, act), lambda *x: attention(*x, act), q, k, v, params=parameters)
    size = difference(lambda *x: 0 * attention(*x, act), lambda *x: attention(*x, act), q, k, v, params=parameters)
    assert diff.outputs < 1e-3 * size.outputs and diff.gradients < 1e-3 * size.gradients


# The command

def run(*words):
    return subprocess.run([sys.executable, "-m", "vitdynconv.bench", *words], capture_output=True, text=True)


@pytest.mark.parametrize("words, says", [(("--suite", "speed"), "core, model, systems, scaling, training, data, all"), (("--device", "tpu"), "cpu, cuda"), (("--threads", "-1"), "--threads -1 is too small"), (("--csv", "no/such/folder.csv"), "no folder")])
def test_bad_input_is_one_line(words, says):
    done = run(*words)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_help():
    done = run("--help")
    assert done.returncode == 0 and "--suite" in done.stdout and "--csv" in done.stdout


def test_rows_become_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(core, "LENGTHS", (49,))
    monkeypatch.setitem(bench.SUITES, "core", bench.Suite("core", ("core_rows",), .01))
    bench.vdc_bench(suite="core", csv=str(tmp_path/"rows.csv"), seconds=.01)
    rows = list(csv.DictReader(open(tmp_path/"rows.csv")))
    assert {row["work"] for row in rows} >= {"softmax", "scaling", "ln_relu, with gradients", "depth-wise"}
    assert all(float(row["low"]) <= float(row["ratio"]) <= float(row["high"]) for row in rows) and rows[0]["torch"] == torch.__version__
    assert "goals met" in capsys.readouterr().out and os.listdir(tmp_path) == ["rows.csv"]


def test_a_race_compares_in_turns():
    calls = []
    taken = timing.race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=4, slot=0)
    assert {name: len(times) for name, times in taken.items()} == {"a": 4, "b": 4}
    assert all(sorted(pair) == ["a", "b"] for pair in zip(calls[4::2], calls[5::2]))
