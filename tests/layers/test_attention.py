"The mixers as a user has them: in timm's place, with wrapped layers, masks, other grids, empty batches, the meta device, tracing and export."
import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention, get_notrace_modules
from timm.models import create_feature_extractor
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import nn
from torch.nn.utils import parametrizations

from vitdynconv.layers.activations import ACTIVATIONS
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.layers.takeover import copy_module, is_plain, layer_size
from vitdynconv.layers.depthwise import DepthwiseSelfAttention, depthwise_attention
from vitdynconv.layers.equivalence import attention_as_convs
from vitdynconv.layers.position import RelativePosition
from vitdynconv.layers.selections.projected import ProjectedKernels
from vitdynconv.layers.selections.rule import Selection
from vitdynconv.tools.testing import assert_equal, difference

few = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(1, 6)
KINDS = [*ACTIVATIONS, 'depthwise', 'depthwise per channel']
every = pytest.mark.parametrize('kind', KINDS)


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def normal(*shape, seed=0): return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed=0):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < .6
    mask[..., 0] = True  # each position selects something
    return mask


def make(kind, **options):
    "A mixer of 8 channels and 2 heads: with this activation, or depth-wise."
    settings = dict(dim=8, num_heads=2, pos='rel', grid_size=(2, 4), num_prefix_tokens=1) | options
    if kind == 'depthwise': return DepthwiseSelfAttention(**settings)
    if kind == 'depthwise per channel': return DepthwiseSelfAttention(**settings, pos_per='channel')
    return DynamicConvAttention(**settings, activation=kind)


# In timm's place

@few
@given(heads=st.sampled_from([1, 2, 4]), n=small, b=small, bias=st.booleans(), norm=st.booleans())
def test_drop_in_for_timm_attention(heads, n, b, bias, norm):
    torch.manual_seed(0)
    theirs = Attention(16, heads, qkv_bias=bias, qk_norm=norm, norm_layer=nn.LayerNorm).double()
    ours = DynamicConvAttention.from_timm(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    pairs = list(zip(ours.parameters(), theirs.parameters()))
    assert max(difference(ours, theirs, normal(b, n, 16), params=pairs)) < 1e-12
    mask = random_mask(n, n)
    assert max(difference(lambda x: ours(x, attn_mask=mask), lambda x: theirs(x, attn_mask=mask), normal(b, n, 16))) < 1e-12


@pytest.mark.parametrize('size', [(8, 8), (8, 12)])
def test_drop_in_for_timm_window_attention(size):
    block = SwinTransformerBlock(8, size, 2, window_size=4, shift_size=2).double()
    nn.init.normal_(block.attn.relative_position_bias_table)
    other = copy.deepcopy(block)
    other.attn = DynamicConvAttention.from_timm(block.attn)
    assert list(other.state_dict()) == list(block.state_dict())
    pairs = [(p, dict(other.named_parameters())[name]) for name, p in block.named_parameters()]
    assert max(difference(block, other, normal(2, *size, 8), params=pairs)) < 1e-12


class Adapter(nn.Module):
    "What adapter libraries put around a layer."
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
    def forward(self, x): return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Doubled(nn.Linear):
    "The same parameters, another function."
    def forward(self, x): return 2 * super().forward(x)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return nn.utils.weight_norm(layer)


def pruned(layer):
    nn.utils.prune.random_unstructured(layer, 'weight', amount=.5)
    return layer


WRAPPERS = dict(adapter=Adapter, adapter_inside=lambda layer: nn.Sequential(Adapter(layer), nn.Dropout(.5)), doubled=lambda layer: Doubled(layer.in_features, layer.out_features),
                weight_norm=parametrizations.weight_norm, spectral_norm=parametrizations.spectral_norm, orthogonal=parametrizations.orthogonal,
                old_weight_norm=old_weight_norm, old_spectral_norm=nn.utils.spectral_norm, pruned=pruned)


def wrapped(part, how, **options):
    attn = Attention(8, 2, qkv_bias=True, **options)
    setattr(attn, part, WRAPPERS[how](getattr(attn, part)))
    return attn.eval()


@pytest.mark.parametrize('how', WRAPPERS)
@pytest.mark.parametrize('part', ['qkv', 'proj'])
def test_wrapped_layers_are_carried_over(part, how):
    theirs = wrapped(part, how)
    ours = DynamicConvAttention.from_timm(theirs)
    x = torch.randn(3, 5, 8)
    assert_equal(ours(x), theirs(x), tol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(w, theirs.state_dict()[name]) for name, w in ours.state_dict().items())
    before = theirs(x).detach()
    ours(x).square().sum().backward()
    assert all(p.grad is not None for p in getattr(ours, part).parameters() if p.requires_grad)
    with torch.no_grad():
        for p in ours.parameters(): p.add_(1)
    assert torch.equal(theirs(x), before)            # nothing is shared


@pytest.mark.parametrize('how', WRAPPERS)
def test_depthwise_keeps_a_wrapped_projection_and_refuses_a_wrapped_qkv(how):
    theirs = wrapped('proj', how)
    ours = DepthwiseSelfAttention.from_timm(theirs)
    x = torch.randn(3, 5, 8)
    q, k, _ = theirs.qkv(x).chunk(3, -1)
    assert_equal(ours(x), theirs.proj(q * k.mean(1, keepdim=True)), tol=1e-5)
    with pytest.raises(ValueError) as e: DepthwiseSelfAttention.from_timm(wrapped('qkv', how))
    for word in ('qkv of Attention', 'nn.Linear', 'remove'): assert word in str(e.value)
    assert '\n' not in str(e.value)


def test_quantised_layers_are_carried_over():
    theirs = torch.ao.quantization.quantize_dynamic(Attention(8, 2, qkv_bias=True).eval(), {nn.Linear}, torch.qint8)
    x = torch.randn(3, 5, 8)
    assert_equal(DynamicConvAttention.from_timm(theirs)(x), theirs(x), tol=1e-5)
    with pytest.raises(ValueError, match='qkv of Attention'): DepthwiseSelfAttention.from_timm(theirs)


def test_frozen_layers_stay_frozen():
    theirs = Attention(8, 2, qkv_bias=True)
    theirs.qkv.requires_grad_(False)
    assert not DynamicConvAttention.from_timm(theirs).qkv.weight.requires_grad
    assert not DepthwiseSelfAttention.from_timm(theirs).qk.weight.requires_grad
    assert DepthwiseSelfAttention.from_timm(theirs).proj.weight.requires_grad


def test_layers_of_unknown_or_wrong_shape_are_refused():
    for layer, words in [(nn.Sequential(nn.Identity()), ['qkv of Attention', 'Sequential', 'in_features']), (nn.Linear(8, 20), ['20 channels', 'proj takes 8']),
                         (Adapter(nn.Linear(8, 16)), ['16 channels'])]:
        theirs = Attention(8, 2)
        theirs.qkv = layer
        for mixer in (DynamicConvAttention, DepthwiseSelfAttention):
            with pytest.raises(ValueError) as e: mixer.from_timm(theirs)
            for word in words: assert word in str(e.value)


def test_attention_dropout_is_kept_or_refused():
    theirs = Attention(8, 2, attn_drop=.3, proj_drop=.2)
    ours = DynamicConvAttention.from_timm(theirs)
    assert (ours.attn_drop.p, ours.proj_drop.p) == (.3, .2)
    with pytest.raises(ValueError, match='attn_drop=0.3.*attn_drop_rate=0'): DepthwiseSelfAttention.from_timm(theirs)
    assert DepthwiseSelfAttention.from_timm(theirs, attn_drop=0.).proj_drop.p == .2


def test_dropout_acts_on_the_weights():
    theirs = Attention(8, 2, attn_drop=.5).double()
    theirs.fused_attn = False
    ours, x = DynamicConvAttention.from_timm(theirs), normal(2, 5, 8)
    outs = []
    for m in (ours, theirs):
        torch.manual_seed(3)
        outs.append(m.train()(x))
    assert_equal(*outs)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    assert_equal(ours(x, attn_mask=mask), ours.proj.bias.expand(2, 5, 8))     # nothing selected, in training too


def test_tables_are_resized_and_repeated():
    theirs = WindowAttention(8, 2, window_size=4)
    nn.init.normal_(theirs.relative_position_bias_table)
    table = theirs.relative_position_bias_table
    per_channel = DepthwiseSelfAttention.from_timm(theirs, pos_per='channel')
    assert torch.equal(per_channel.relative_position_bias_table, table.repeat_interleave(4, 1))
    larger = DynamicConvAttention.from_timm(theirs, grid_size=6)
    assert torch.equal(larger.relative_position_bias_table, RelativePosition(table, (4, 4)).resized((6, 6)).table)
    again = DynamicConvAttention.from_timm(DynamicConvAttention.from_timm(theirs), activation='relu')
    assert torch.equal(again.relative_position_bias_table, table)


def test_an_activation_keeps_its_weights_from_mixer_to_mixer():
    first = DynamicConvAttention(8, 2, activation='ln', grid_size=3)
    nn.init.normal_(first.act.weight)
    assert torch.equal(DynamicConvAttention.from_timm(first, activation='ln_relu').act.weight, first.act.weight)
    depthwise = DepthwiseSelfAttention.from_timm(DepthwiseSelfAttention.from_timm(first))
    assert torch.equal(depthwise.qk.weight, first.qkv.weight[:16])
    with pytest.raises(ValueError, match='no values'): DynamicConvAttention.from_timm(depthwise)


def test_copies_of_awkward_modules():
    for wrap in WRAPPERS.values():
        layer = wrap(nn.Linear(4, 6)).eval()
        x = torch.randn(2, 4)
        other = copy_module(layer)
        assert torch.equal(other(x), layer(x)) and layer_size(layer, 'x') == (4, 6) and not is_plain(layer)
        assert layer.training == other.training == False  # noqa: E712


# Masks and selections

@every
def test_a_masked_region_has_no_influence(kind):
    m, x = make(kind).double(), normal(2, 9, 8).requires_grad_()
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[:5, :5] = mask[5:, 5:] = True
    y = m(x, mask=mask)
    changed = x.detach().clone()
    changed[:, 5:] += 7
    assert torch.equal(m(changed, mask=mask)[:, :5], y[:, :5])
    grad, = torch.autograd.grad(y[:, :5].square().sum(), x)
    assert (grad[:, 5:] == 0).all() and (grad[:, :5] != 0).any()


@every
@pytest.mark.parametrize('training', [True, False])
def test_an_image_of_padding(kind, training):
    "It gets the bias of the output projection, no gradient, and the other images do not notice."
    m, x = make(kind).double().train(training), normal(3, 9, 8).requires_grad_()
    mask = random_mask(3, 1, 9, 9)
    mask[1] = False
    y = m(x, mask=mask)
    assert_equal(y[1], m.proj.bias.expand(9, 8))
    assert torch.equal(y[[0, 2]], m(x[[0, 2]], mask=mask[[0, 2]]))
    grads = torch.autograd.grad(y.square().sum(), [x, *m.parameters()])
    assert all(g.isfinite().all() for g in grads) and (grads[0][1] == 0).all()


@pytest.mark.parametrize('kind', [k for k in KINDS if k not in ('softmax', 'softmax_plus_one', 'sparsemax')])
def test_swin_masks_are_selections(kind):
    m, x = make(kind, num_prefix_tokens=0).double(), normal(6, 8, 8)
    mask = random_mask(3, 8, 8)
    additive = torch.zeros(3, 8, 8, dtype=torch.float64).masked_fill(~mask, -100)
    assert torch.equal(m(x, mask=additive), m(x, mask=mask))


class FirstHalf(Selection):
    "A hard selection: the kernels of the first half of the map, whatever stands in front."
    def forward(self, q, k, v, mask=None):
        n, m = q.shape[-2], k.shape[-2]
        chosen = (torch.arange(m, device=k.device) < m // 2).expand(n, m)
        return k, v, chosen if mask is None else mask & chosen


@every
def test_a_hard_selection_is_a_mask(kind):
    x, half = normal(2, 9, 8), torch.arange(9) < 4
    torch.manual_seed(1)
    chosen = make(kind, selection=FirstHalf()).double()
    plain = make(kind).double()
    plain.load_state_dict(chosen.state_dict())
    assert_equal(chosen(x), plain(x, mask=half.expand(9, 9)))
    mask = random_mask(9, 9)
    assert_equal(chosen(x, mask=mask), plain(x, mask=half & mask))
    chosen.set_grid_size((3, 3))
    assert chosen.selection.grid_size == (3, 3)


@pytest.mark.parametrize('kind', [*ACTIVATIONS, 'depthwise'])
def test_a_soft_selection_mixes_kernels(kind):
    m, x = make(kind, pos=None, num_prefix_tokens=0, selection=ProjectedKernels((2, 4), 3, 2)).double(), normal(2, 8, 8)
    parts = 2 if kind == 'depthwise' else 3
    q, *bank = (m.qk if parts == 2 else m.qkv)(x).unflatten(2, (parts, 2, 4)).permute(2, 0, 3, 1, 4)
    E, F = m.selection.E, m.selection.F
    k = torch.einsum('hnk,bhnd->bhkd', E, bank[0])
    if kind == 'depthwise': y = q * k.mean(2, keepdim=True)
    else: y = m.act(q @ k.mT) @ torch.einsum('hnk,bhnd->bhkd', F, bank[1])
    assert_equal(m(x), m.proj(y.transpose(1, 2).flatten(2)))


def test_selections_by_name():
    assert DynamicConvAttention(8, 2, grid_size=(2, 4), selection='projected', activation='ln')(torch.randn(1, 8, 8)).shape == (1, 8, 8)
    assert DynamicConvAttention(8, 2, selection='all')(torch.randn(1, 8, 8)).shape == (1, 8, 8)
    with pytest.raises(ValueError, match="'nearest'.*all"): DynamicConvAttention(8, 2, grid_size=3, selection='nearest')
    with pytest.raises(ValueError, match='grid_size'): DynamicConvAttention(8, 2, selection='projected')
    with pytest.raises(ValueError, match='soft selection'): DynamicConvAttention(8, 2, grid_size=3, selection='projected', pos='rel')


# Other grids

@every
def test_another_grid_in_passing_is_another_grid_permanently(kind):
    m = make(kind).double()
    for p in m.parameters(): nn.init.normal_(p, std=.5)
    moved = copy.deepcopy(m)
    moved.set_grid_size((5, 3))
    m.live_grid = 5, 3
    x = normal(2, 16, 8)
    assert_equal(m(x), moved(x), tol=1e-6)
    m(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in m.named_parameters() if n != 'qkv.bias')
    m.live_grid = None
    assert m(normal(2, 9, 8)).shape == (2, 9, 8) and m.relative_position_bias_table.shape[0] == 3 * 7


@pytest.mark.parametrize('kind', [*ACTIVATIONS, 'depthwise'])
@pytest.mark.parametrize('grid', [(1, 3), (2, 2), (4, 6)])
def test_mixtures_of_another_grid(kind, grid):
    "A smaller map asks for other projections, not for the first rows of these."
    m = make(kind, pos=None, selection=ProjectedKernels((2, 4), 3, 2, num_prefix_tokens=1)).double()
    moved = copy.deepcopy(m)
    moved.set_grid_size(grid)
    x = normal(2, 1 + grid[0] * grid[1], 8)
    with pytest.raises(ValueError, match='set_grid_size'): m(x)
    m.live_grid = grid
    assert_equal(m(x), moved(x), tol=1e-6)
    m(x).square().sum().backward()
    assert m.selection.E.grad.abs().max() > 0


def test_no_buffers():
    "A model from the meta device has nothing that a state dict would not fill."
    for kind in ('softmax', 'depthwise'):
        full = make(kind)
        assert not dict(full.named_buffers())
        with torch.device('meta'): m = make(kind)
        m.load_state_dict(full.state_dict(), assign=True)
        x = torch.randn(2, 9, 8)
        assert torch.equal(m(x), full(x))
        empty = make(kind, device='meta').to_empty(device='cpu')
        empty.load_state_dict(full.state_dict())
        assert torch.equal(empty(x), full(x))


# Empty, meta, traced, exported, copied

@every
def test_an_empty_batch(kind):
    m, x = make(kind), torch.zeros(0, 9, 8, requires_grad=True)
    for mask in (None, random_mask(9, 9), torch.zeros(3, 9, 9)):
        y = m(x, mask=mask)
        y.sum().backward()
        assert y.shape == (0, 9, 8)
    if not kind.startswith('depthwise'):
        m.backend = attention_as_convs
        assert m(x).shape == (0, 9, 8)


@every
def test_the_meta_device(kind):
    m = make(kind, device='meta')
    x = torch.empty(2, 9, 8, device='meta')
    for mask in (None, torch.empty(9, 9, device='meta'), torch.empty(2, 9, 9, dtype=torch.bool, device='meta')): assert m(x, mask=mask).shape == (2, 9, 8)
    m.live_grid = 3, 5
    assert m(torch.empty(2, 16, 8, device='meta')).is_meta


@every
def test_tracing_keeps_the_batch_free(kind):
    m, x = make(kind).eval(), torch.randn(5, 9, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(m, torch.randn(2, 9, 8))
    assert_equal(traced(x), m(x), tol=1e-5)


@every
def test_export_keeps_the_batch_free(kind):
    m, x = make(kind).eval(), torch.randn(5, 9, 8)
    program = torch.export.export(m, (torch.randn(2, 9, 8),), dynamic_shapes=dict(x={0: torch.export.Dim('batch')}))
    assert_equal(program.module()(x), m(x), tol=1e-5)


@every
def test_the_older_onnx_exporter(kind):
    pytest.importorskip('onnx')
    m = make(kind).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(m, (torch.randn(2, 9, 8),), io.BytesIO(), dynamo=False, opset_version=17, input_names=['x'], dynamic_axes=dict(x={0: 'batch'}))


@pytest.mark.parametrize('kind', ['softmax', 'ln_relu', 'depthwise'])
def test_timm_feature_extraction(kind):
    assert {DynamicConvAttention, DepthwiseSelfAttention} <= set(get_notrace_modules())
    net = nn.Sequential(nn.LayerNorm(8), make(kind), nn.Linear(8, 3))
    x = torch.randn(2, 9, 8)
    features = create_feature_extractor(net, ['1'])(x)['1']
    assert torch.equal(features, net[:2](x))


@pytest.mark.parametrize('kind', ['softmax', 'ln', 'depthwise'])
def test_mixers_survive_copies_and_half_precision(kind):
    m = make(kind)
    x = normal(2, 9, 8).float()
    for other in copy.deepcopy(m), pickle.loads(pickle.dumps(m)): assert torch.equal(other(x), m(x))
    assert_equal(copy.deepcopy(m).bfloat16()(x.bfloat16()).float(), m(x), tol=5e-2)


# Depth-wise

@few
@given(h=st.integers(1, 3), d=st.integers(1, 3), b=small, n=small, per_channel=st.booleans())
def test_depthwise_is_equation_5(h, d, b, n, per_channel):
    q, k = normal(b, h, n, d), normal(b, h, n, d, seed=1)
    bias, mask = normal(h * d if per_channel else h, n, n, seed=2), random_mask(n, n)
    mask[n // 2] = n < 3
    y = depthwise_attention(q, k, bias, mask)
    for image, head, i, c in [(b - 1, h - 1, n - 1, d - 1), (0, 0, n // 2, 0)]:
        chosen = mask[i].nonzero().flatten().tolist()
        mean = sum(k[image, head, j, c] for j in chosen) / max(1, len(chosen))
        row = bias[head * d + c if per_channel else head, i]
        expected = q[image, head, i, c] * mean + sum(row[j] * k[image, head, j, c] for j in chosen)
        assert_equal(y[image, head, i, c], torch.as_tensor(expected, dtype=torch.float64))


def test_depthwise_takes_a_table_as_its_bias():
    q, k = normal(2, 3, 7, 2), normal(2, 3, 7, 2, seed=1)
    for tables in (3, 6):
        position = RelativePosition(normal(15, tables), (2, 3), 1)
        assert torch.equal(depthwise_attention(q, k, position=position), depthwise_attention(q, k, position.bias()))


@pytest.mark.parametrize('wrong, words', [
    (lambda: DynamicConvAttention(10, 3), ['3 heads', 'dim=10']),
    (lambda: DynamicConvAttention(8, 2, pos='relative'), ['relative', "'rel'"]),
    (lambda: DynamicConvAttention(8, 2, pos='rel'), ['grid_size']),
    (lambda: DepthwiseSelfAttention(10, 3), ['3 heads', 'dim=10']),
    (lambda: DepthwiseSelfAttention(8, 2, pos_per='row'), ['row', 'channel']),
    (lambda: DepthwiseSelfAttention(8, 2, attn_drop=.1), ['attn_drop=0.1', 'attn_drop=0']),
    (lambda: DynamicConvAttention(8, 2, activation='scaling')(normal(1, 3, 8).float(), mask=torch.full((3, 3), -3.)), ['-3.0', '-100']),
    (lambda: depthwise_attention(normal(1, 2, 5, 3), normal(1, 2, 5, 4)), ['(1, 2, 5, 3)', '(1, 2, 5, 4)']),
    (lambda: depthwise_attention(normal(1, 2, 5, 3), normal(1, 2, 5, 3), mask=torch.ones(4, 5).bool()), ['(4, 5)', '5 positions']),
    (lambda: depthwise_attention(normal(1, 2, 5, 3), normal(1, 2, 5, 3), torch.zeros(3, 5, 5)), ['(3, 5, 5)', '(2, 5, 5)']),
])
def test_bad_input_is_named(wrong, words):
    with pytest.raises(ValueError) as e: wrong()
    for word in words: assert word in str(e.value)
    assert '\n' not in str(e.value)
