"Dynamic convolutions against loops over images, positions and kernels, over shapes drawn by hypothesis."
import copy
import itertools
import math
import pickle
import warnings

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from timm.layers import Attention
from torch import nn

from vitdynconv.layers.activations import ACTIVATIONS
from vitdynconv.layers.conv import to_map, to_tokens
from vitdynconv.tools.testing import assert_equal, difference
from vitdynconv.layers.dconv import DynamicConv1d, DynamicConv2d, anneal, conv_by_patches, conv_per_image
from vitdynconv.layers.dynconv import (
    DynamicDepthwiseConv1d, DynamicDepthwiseConv2d, GeneratedConv2d, Involution2d, local_conv)
from vitdynconv.layers.kxk import KernelAttention2d
from vitdynconv.layers.equivalence import attention_to_convs
from vitdynconv.layers.selections.projected import ProjectedKernels
from vitdynconv.layers.selections.window import WindowKernels

few = settings(max_examples=25, deadline=None, derandomize=True)
odd, small = st.sampled_from([1, 3, 5]), st.integers(1, 3)


def normal(*shape, seed=0): return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomized(module, std=.3):
    torch.manual_seed(0)
    for p in module.parameters(): nn.init.normal_(p, std=std)
    for name, b in module.named_buffers():
        if 'running' in name: b.uniform_(.5, 2)
    return module.double().eval()


def against_literal(module, x): return max(difference(module, module.literal, x, params=[(p, p) for p in module.parameters()]))


@few
@given(nd=st.integers(1, 2), b=small, groups=st.sampled_from([1, 2]), k=st.integers(1, 4), stride=small, padding=st.integers(0, 2), dilation=st.integers(1, 2), m=st.integers(1, 5), bias=st.booleans(), size=st.integers(7, 10))
def test_mixed_kernel_is_the_sum_of_convolutions(nd, b, groups, k, stride, padding, dilation, m, bias, size):
    conv = randomized((DynamicConv1d, DynamicConv2d)[nd - 1](4, 6, k, stride, padding, dilation, groups, bias, num_kernels=m, temperature=.5))
    assert against_literal(conv, normal(b, 4, *(size, 8)[:nd])) < 1e-12


def test_one_kernel_is_an_ordinary_convolution():
    conv, plain = DynamicConv2d(4, 6, 3, 2, 1, num_kernels=1).double(), nn.Conv2d(4, 6, 3, 2, 1).double()
    plain.weight.data, plain.bias.data = conv.weight.data[0], conv.bias.data[0]
    assert_equal(conv(normal(2, 4, 7, 8)), plain(normal(2, 4, 7, 8)))


def test_coefficients_see_the_mean_only_and_belong_to_one_image():
    conv, x = randomized(DynamicConv2d(32, 6, 3, temperature=1.)), normal(2, 32, 6, 6)
    order = torch.randperm(36)
    shuffled = x.flatten(2)[..., order].unflatten(2, (6, 6))
    assert_equal(conv.coefficients(shuffled), conv.coefficients(x))
    assert_equal(conv.coefficients(x).sum(1), torch.ones(2, dtype=torch.float64))
    other = x.clone(); other[1] += 1
    assert_equal(conv(other)[0], conv(x)[0])
    assert (conv.coefficients(other)[1] - conv.coefficients(x)[1]).abs().max() > 1e-3


def test_temperature_falls_and_is_saved():
    model = nn.Sequential(DynamicConv2d(4, 4, 3), nn.ReLU(), DynamicConv1d(4, 4, 3))
    assert [model[0].anneal(e) for e in (0, 2.5, 10, 50)] == [30, 22.75, 1, 1]
    assert model[0].anneal(1, epochs=2, start=10, end=2) == 6
    assert anneal(model, 5) == 2 and model[2].temperature == 15.5
    fresh = DynamicConv2d(4, 4, 3)
    fresh.load_state_dict(model[0].state_dict())
    assert fresh.temperature == 15.5
    assert set(fresh.state_dict()) == {'weight', 'bias', 'temperature_millionths', 'router.0.weight', 'router.0.bias', 'router.2.weight', 'router.2.bias'}


@few
@given(nd=st.integers(1, 2), b=small, k=odd, k2=odd, stride=small, dilation=st.integers(1, 2), groups=st.sampled_from([None, 1, 2]), per=st.sampled_from(['position', 'image']), size=st.integers(1, 9), reduction=st.sampled_from([None, 2]))
def test_generated_depthwise_kernels(nd, b, k, k2, stride, dilation, groups, per, size, reduction):
    conv = randomized((DynamicDepthwiseConv1d, DynamicDepthwiseConv2d)[nd - 1](4, (k, k2)[:nd], stride, dilation, per, groups, reduction=reduction))
    x = normal(b, 4, *(size, 6)[:nd])
    assert conv(x).shape[2:] == tuple(math.ceil(n / stride) for n in x.shape[2:])
    assert against_literal(conv, x) < 1e-12


@few
@given(k=odd, stride=small, group=st.sampled_from([1, 2, 4]), h=st.integers(2, 9), w=st.integers(2, 9))
def test_involution(k, stride, group, h, w):
    assert against_literal(randomized(Involution2d(8, k, stride, group, reduction=2)), normal(2, 8, h, w)) < 1e-12


def test_involution_like_the_published_formula():
    "Reduce, span, unfold, multiply and sum, as in section 3 of arXiv 2103.06255, in plain PyTorch."
    layer, x = randomized(Involution2d(8, 3, 2, group_channels=4)), normal(2, 8, 6, 8)
    g = layer.generator
    kernel = F.conv2d(F.relu(g.norm(F.conv2d(F.avg_pool2d(x, 2), g.reduce.weight, g.reduce.bias))), g.span.weight, g.span.bias).reshape(2, 2, 1, 9, 3, 4)
    patches = F.unfold(x, 3, padding=1, stride=2).reshape(2, 2, 4, 9, 3, 4)
    assert_equal(layer(x), (kernel * patches).sum(3).reshape(2, 8, 3, 4))


def test_shared_kernels_take_both_ways():
    "Kernels shared by the image, through the loop over taps and through the grouped convolution."
    conv, x = randomized(DynamicDepthwiseConv2d(4, 5, per='image', bias=False)), normal(3, 4, 7, 6)
    assert_equal(local_conv(x, conv.kernels(x), (5, 5)), conv(x))


def test_loop_over_taps_remembers_little():
    conv, saved = Involution2d(16, 7).eval(), {}
    def note(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    x = torch.randn(1, 16, 40, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): conv(x)
    assert sum(saved.values()) < 12 * x.numel() * 4   # unfold alone would be 49


@pytest.mark.parametrize('per', ['image', 'position'])
@pytest.mark.parametrize('k', [1, 3])
def test_generated_dense_kernels(per, k):
    assert against_literal(randomized(GeneratedConv2d(4, k, per), .2), normal(2, 4, 5, 6)) < 1e-12


@few
@given(nd=st.integers(1, 3), b=small, groups=st.sampled_from([1, 2]), stride=small)
def test_conv_per_image(nd, b, groups, stride):
    x, w, bias = normal(b, 4, *[5] * nd), normal(b, 6, 4 // groups, *[3] * nd, seed=1), normal(b, 6, seed=2)
    conv = (F.conv1d, F.conv2d, F.conv3d)[nd - 1]
    assert_equal(conv_per_image(x, w, bias, groups, stride=stride, padding=1), torch.cat([conv(x[i:i + 1], w[i], bias[i], stride, 1, 1, groups) for i in range(b)]))


@few
@given(k=odd, stride=st.integers(1, 2), name=st.sampled_from(list(ACTIVATIONS)), selection=st.sampled_from(['all', 'local', 'soft']), rel=st.booleans(), heads=st.sampled_from([1, 2]))
def test_kernels_of_k_by_k(k, stride, name, selection, rel, heads):
    rule = {'all': None, 'local': WindowKernels((2, 3)), 'soft': ProjectedKernels((4, 6), 5, heads)}[selection]
    block = KernelAttention2d(4, heads, k, stride, activation=name, num_kernels=5 if selection == 'soft' else 24, selection=rule, pos='rel' if rel and selection != 'soft' else None, grid_size=(4, 6))
    assert against_literal(randomized(block, .1), normal(2, 4, 4, 6)) < 1e-12


def test_size_one_is_self_attention_and_back():
    timm_attn, block, x = Attention(24, 3, qkv_bias=True).double(), KernelAttention2d(24, 3, 1).double(), normal(2, 24, 5, 4)
    block.load_state_dict(attention_to_convs(timm_attn.state_dict()))
    assert max(difference(block, lambda x: to_map(timm_attn(to_tokens(x)), 5, 4), x)) < 1e-12
    strided = KernelAttention2d(24, 3, 1, stride=2).double()
    strided.load_state_dict(block.state_dict())
    assert_equal(strided(x), block(x)[..., ::2, ::2])


def test_a_window_has_no_influence_on_another():
    block, x = randomized(KernelAttention2d(4, 2, 1, selection=WindowKernels(2))), normal(1, 4, 4, 4)
    other = x.clone(); other[..., 2:] = 1e3
    assert torch.equal(block(other)[..., :2], block(x)[..., :2])


MODULES = {'D-Conv': lambda: DynamicConv2d(8, 8, 3, padding=1), 'D-DW-Conv': lambda: DynamicDepthwiseConv2d(8, 3), 'per image': lambda: DynamicDepthwiseConv2d(8, 3, per='image'),
           'involution': lambda: Involution2d(8, 3, group_channels=4), 'generated': lambda: GeneratedConv2d(8), 'k x k': lambda: KernelAttention2d(8, 2, stride=2)}
modules = pytest.mark.parametrize('name', MODULES)


@modules
def test_gradients_by_finite_differences(name):
    assert torch.autograd.gradcheck(randomized(MODULES[name](), .2), normal(1, 8, 3, 2).requires_grad_())


@modules
def test_copy_pickle_and_state_dict(name):
    module, x = randomized(MODULES[name]()), normal(2, 8, 5, 6)
    fresh = MODULES[name]().double().eval()
    fresh.load_state_dict(module.state_dict())
    for other in copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh: assert_equal(other(x), module(x))


@modules
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.half])
def test_half_precision(name, dtype):
    module, x = MODULES[name]().eval(), torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    exact, out = module(x), copy.deepcopy(module).to(dtype)(x.to(dtype)).float()
    assert torch.isfinite(out).all() and (out - exact).norm() < .05 * exact.norm()


@modules
def test_export_with_any_batch_size(name):
    module, x = MODULES[name]().eval(), torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim('b', min=1, max=64)},))
    for b in 2, 5:
        x = torch.randn(b, 8, 6, 6, generator=torch.Generator().manual_seed(b))
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('wrong, message', [
    (lambda: DynamicConv2d(8, 6, 3, groups=4), '4 groups do not divide out_channels=6'), (lambda: DynamicConv2d(8, 6, 3, num_kernels=0), 'num_kernels=0'), (lambda: DynamicConv2d(8, 6, 3, num_kernels=2.5), 'num_kernels=2.5 is no number of kernels'), (lambda: DynamicConv2d(8, 6, 3, num_kernels='4'), "num_kernels='4' is no number"),
    (lambda: DynamicDepthwiseConv2d(8, 4), 'choose odd sizes'),
    (lambda: DynamicDepthwiseConv2d(8, 3, per='pixel'), "choose 'position' or 'image'"), (lambda: DynamicDepthwiseConv2d(8, 3, groups=3), '3 groups'), (lambda: Involution2d(24), 'group_channels=16'),
    (lambda: GeneratedConv2d(4, 2), 'kernel_size=2'), (lambda: GeneratedConv2d(4, 3, 'pixel'), 'per='), (lambda: KernelAttention2d(10, 4), '4 heads'), (lambda: KernelAttention2d(8, 2, 2), 'kernel_size=2'),
    (lambda: KernelAttention2d(8, 2, pos='rel'), 'grid_size'), (lambda: KernelAttention2d(8, 2, pos='rel', grid_size=2, selection=ProjectedKernels(2, 2)), 'soft selection'),
    (lambda: KernelAttention2d(8, 2, selection=WindowKernels(3))(torch.randn(1, 8, 4, 4)), 'do not tile')])
def test_wrong_settings_are_answered(wrong, message):
    with pytest.raises(ValueError, match=message): wrong()


@modules
def test_no_images_and_meta_device(name):
    module = MODULES[name]().eval()
    out = module(torch.zeros(2, 8, 6, 6)).shape[1:]
    x = torch.zeros(0, 8, 6, 6, requires_grad=True)
    y = module(x)
    assert y.shape == (0, *out)
    y.sum().backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)
    assert module.to('meta')(torch.zeros(3, 8, 6, 6, device='meta')).shape == (3, *out)


@modules
def test_traced_with_any_batch_size(name):
    module = MODULES[name]().eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(module, torch.randn(2, 8, 6, 6))
    for b in 0, 1, 5:
        x = torch.randn(b, 8, 6, 6)
        torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


@modules
def test_as_a_leaf_of_torch_fx(name):
    from timm.models import create_feature_extractor
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = MODULES[name]().eval(), nn.ReLU()
        def forward(self, x): return self.act(self.conv(x))
    net, x = Net().eval(), torch.randn(2, 8, 6, 6)
    found = create_feature_extractor(net, ['conv'])(x)
    torch.testing.assert_close(list(found.values())[0] if isinstance(found, dict) else found[0], net.conv(x))


@modules
def test_reset_gives_memory_a_meaning(name):
    "Built on the meta device, given memory, started: as good as new."
    with torch.device('meta'): module = MODULES[name]()
    module = module.to_empty(device='cpu')
    for p in module.parameters(): nn.init.constant_(p, math.nan)
    for b in module.buffers(): b.fill_(0)
    for part in module.modules():
        if hasattr(part, 'reset_parameters'): part.reset_parameters()
    assert torch.isfinite(module.eval()(torch.randn(2, 8, 6, 6))).all()


@few
@given(nd=st.integers(1, 2), b=st.integers(0, 3), groups=st.sampled_from([1, 2]), stride=small, dilation=st.integers(1, 2), k=st.integers(1, 4), padding=st.sampled_from([0, 2, 'same', 'valid']))
def test_patches_are_convolutions(nd, b, groups, stride, dilation, k, padding):
    if padding == 'same': stride = 1
    x, w, bias = normal(b, 4, *(9, 8)[:nd]), normal(b, 6, 4 // groups, *[k] * nd, seed=1), normal(b, 6, seed=2)
    conv = (F.conv1d, F.conv2d)[nd - 1]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # 'same' with an even kernel copies
        wanted = [conv(x[i:i + 1], w[i], bias[i], stride, padding, dilation, groups) for i in range(b)]
    y = conv_by_patches(x, w, bias, groups, stride=stride, padding=padding, dilation=dilation)
    if b: assert_equal(y, torch.cat(wanted))
    else: assert len(y) == 0


def test_temperature_is_a_schedule():
    "Nobody casts it, averages it or decays it; who copies the network follows it, and it is exact."
    from timm.optim import param_groups_weight_decay
    from timm.utils import ModelEmaV3
    conv = DynamicConv2d(4, 4, 3, temperature=30)
    for exclude in False, True:
        average = ModelEmaV3(conv, decay=.5, exclude_buffers=exclude)
        conv.anneal(3.3)
        average.update(conv)
        assert average.module.temperature == conv.temperature == 20.43
    averaged = torch.optim.swa_utils.AveragedModel(conv)
    conv.anneal(6.6)
    averaged.update_parameters(conv)
    assert conv.temperature == 10.86
    assert copy.deepcopy(conv).half().float().double().temperature == 10.86
    assert 'temperature_millionths' not in dict(conv.named_parameters())
    x = normal(2, 4, 5, 5)
    conv = DynamicConv2d(4, 4, 3, temperature=.7).double()
    scores = conv.router(x.mean((2, 3)))
    torch.testing.assert_close(conv.coefficients(x), (scores / .7).softmax(-1), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize('mean, relu', [('max', True), ('mean', False)])
def test_router_is_mean_and_relu(mean, relu):
    "The reference with max for mean, or without ReLU, is another router."
    conv, x = randomized(DynamicConv2d(8, 6, 3, temperature=1.), .8), normal(4, 8, 5, 5)
    pooled = x.amax((2, 3)) if mean == 'max' else x.mean((2, 3))
    hidden = conv.router[0](pooled)
    other = conv.router[2](F.relu(hidden) if relu else hidden).softmax(-1)
    assert (other - conv.coefficients(x)).abs().max() > 1e-2
    right = conv.router[2](F.relu(conv.router[0](x.mean((2, 3))))).softmax(-1)
    assert_equal(conv.coefficients(x), right)


@few
@given(nd=st.integers(1, 2), k=odd, stride=small, dilation=st.integers(1, 2), groups=st.sampled_from([1, 2, 4]), shared=st.booleans())
def test_gradients_written_out(nd, k, stride, dilation, groups, shared):
    "The custom backward pass against automatic differentiation of the literal sum over taps."
    x = normal(2, 4, *(7, 6)[:nd])
    out = [1] * nd if shared else [math.ceil(n / stride) for n in x.shape[2:]]
    kernels = normal(2, groups, k ** nd, *out, seed=1)
    def summed(x, kernels):
        padded = F.pad(x, [dilation * (k // 2)] * (2 * nd))
        y = 0
        for tap, offset in enumerate(itertools.product(range(k), repeat=nd)):
            part = padded
            for axis, (o, n) in enumerate(zip(offset, x.shape[2:])):
                part = part.narrow(axis + 2, o * dilation, n)[(slice(None),) * (axis + 2) + (slice(None, None, stride),)]
            y = y + kernels[:, :, tap].repeat_interleave(4 // groups, 1) * part
        return y
    diff = difference(lambda x, kernels: local_conv(x, kernels, (k,) * nd, stride, dilation), summed, x, kernels)
    assert max(diff) < 1e-12


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_local_conv_under_autocast(dtype):
    conv, x = DynamicDepthwiseConv2d(8, 3, norm_layer=None), torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast('cpu', dtype): y = conv(x)
    grad, = torch.autograd.grad(y.float().square().sum(), x)
    exact, = torch.autograd.grad(conv(x).square().sum(), x)
    assert (grad - exact).norm() < .05 * exact.norm()
