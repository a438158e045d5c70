"The framework as a user has it: descriptions from behaviour, Table 1, the design space, vdc_equiv."
import copy
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitdynconv.layers.activations import ACTIVATIONS
from vitdynconv.layers.families.layernorm import masked_norm
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.tools.testing import assert_equal
from vitdynconv.layers.depthwise import DepthwiseSelfAttention
from vitdynconv.layers.dconv import DynamicConv1d, DynamicConv2d
from vitdynconv.layers.dynconv import DynamicDepthwiseConv2d, GeneratedConv2d, Involution2d
from vitdynconv.layers.kxk import KernelAttention2d
from vitdynconv.layers.equivalence import DynamicConvBlock
from vitdynconv.framework import reference
from vitdynconv.framework.commands import vdc_equiv
from vitdynconv.framework.description import describe, table1
from vitdynconv.framework.probe import CutMixer
from vitdynconv.framework.proofs import all_proofs, equivalence_table
from vitdynconv.framework.space import RULES, against_definition, build, design_space, further_selections, why_not
from vitdynconv.framework.spec import KernelSpec, generator_weights
from vitdynconv.layers.selection import SELECTIONS
from vitdynconv.layers.selections.neighborhood import NeighborhoodKernels
from vitdynconv.layers.selections.projected import ProjectedKernels
from vitdynconv.layers.selections.topk import TopKernels

POSSIBLE = [cell.spec for cell in design_space() if cell.reason is None]
name_of = lambda spec: '-'.join(str(v) for v in (spec.bank, spec.selection, spec.kernel_type, spec.kernel_size, spec.activation, spec.position))


# describe

class Attn(nn.Module):
    "Somebody else's self-attention, under a name that says nothing, with linear layers of its own."
    def __init__(self, dim, window=None):
        super().__init__()
        self.qkv, self.proj, self.window = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), window

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT / q.shape[-1] ** .5
        if self.window:
            block = torch.arange(x.shape[1]) // self.window
            scores = scores.masked_fill(block[:, None] != block, -torch.inf)
        return self.proj(scores.softmax(-1) @ v)


def test_behaviour_counts_not_the_name():
    x = torch.randn(1, 16, 24)
    assert describe(Attn(24), x) == KernelSpec('dynamic', 'all', 'pair', 1, 'softmax')
    local = describe(Attn(24, window=4), x)
    assert local == KernelSpec('dynamic', 'local', 'pair', 1, 'softmax') and local.num_kernels == 4
    class Sigmoid(Attn):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj((q @ k.mT).sigmoid() @ v)
    assert describe(Sigmoid(24), x) == KernelSpec('dynamic', 'all', 'pair', 1, 'unknown')
    class DynamicConvAttention2(nn.Conv2d): pass
    with pytest.raises(ValueError, match='no token mixer'): describe(DynamicConvAttention2(3, 3, 3), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize('shift', [0, 2])
@pytest.mark.parametrize('size', [(8, 8), (8, 12), (7, 10)])
def test_swin_blocks(size, shift):
    block = SwinTransformerBlock(24, size, 3, window_size=4, shift_size=shift)
    found = describe(nn.Sequential(block), torch.randn(1, *size, 24))['0.attn']
    assert found == KernelSpec('dynamic', 'local', 'pair', 1, 'softmax', 'rel') and 1 < found.num_kernels <= 16


@pytest.mark.parametrize('name', list(ACTIVATIONS))
def test_activation_and_position_of_ours(name):
    for pos in None, 'rel':
        found = describe(DynamicConvAttention(24, 3, activation=name, pos=pos, grid_size=(3, 4), num_prefix_tokens=1))
        assert found == KernelSpec('dynamic', 'all', 'pair', 1, name, pos) and found.num_kernels == 13


def test_number_of_mixtures_and_of_bank_kernels():
    assert describe(DynamicConvAttention(24, 3, selection=ProjectedKernels((4, 5), 7, 3))).num_kernels == 7
    assert describe(DynamicConv2d(24, 12, 3, padding=1, stride=2, num_kernels=6)) == KernelSpec('static', 'soft', 'dense', 3)
    assert describe(DynamicConv2d(24, 12, 3, num_kernels=6)).num_kernels == 6
    assert describe(DynamicConv1d(24, 24, 5, padding=2)) == KernelSpec('static', 'soft', 'dense', 5)
    assert describe(Involution2d(32, 7)) == describe(DynamicDepthwiseConv2d(32, 7, dilation=2)) == KernelSpec('none', 'none', 'depthwise', 7)


def test_whole_models():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, reg_tokens=2, num_classes=3)
    assert describe(vit) == {'blocks.0.attn': KernelSpec('dynamic', 'all', 'pair', 1, 'softmax', 'abs')}
    assert describe(vit)['blocks.0.attn'].num_kernels == 19
    vit.pos_embed = None
    assert describe(vit)['blocks.0.attn'].position is None
    swin = SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 1), num_heads=(3, 3), num_classes=3)
    found = describe(swin)
    assert [s.selection for s in found.values()] == ['local', 'local', 'all']    # in the last stage the window is the map
    assert {s.position for s in found.values()} == {'rel'}


def test_networks_of_this_library():
    from vitdynconv.models.registry import create_model
    expected = {'dconv_deit_tiny_patch16_224': KernelSpec('static', 'soft', 'dense', 3, None, 'abs'), 'ddwconv_deit_tiny_patch16_224': KernelSpec('none', 'none', 'depthwise', 7, None, 'abs'),
                'linformer_deit_tiny_patch16_224': KernelSpec('dynamic', 'soft', 'pair', 1, 'softmax', 'abs'), 'deit_tiny_patch16_224': KernelSpec('dynamic', 'all', 'pair', 1, 'softmax', 'abs')}
    for name, spec in expected.items(): assert set(describe(create_model(name, depth=1, img_size=64)).values()) == {spec}, name
    depthwise = create_model('deit_tiny_patch16_224', depth=1, img_size=64, kernel='depthwise', pos='rel')
    assert set(describe(depthwise).values()) == {KernelSpec('dynamic', 'all', 'depthwise', 1, None, 'rel')}


def test_describing_changes_nothing():
    module, x = DynamicConvAttention(24, 3, activation='ln', num_kernels=16), torch.randn(1, 16, 24)
    module.train()
    before, state, rng = module(x), copy.deepcopy(module.state_dict()), torch.get_rng_state()
    describe(module, x)
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(module(x), before) and module.training
    assert all(torch.equal(module.state_dict()[k], v) for k, v in state.items()) and all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    other = Attn(24)
    rng = torch.get_rng_state()
    describe(other, x)
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_cut_mixer_is_cross_attention():
    layer, (x, z) = WindowAttention(24, 3, window_size=4).double(), torch.randn(2, 1, 16, 24, dtype=torch.float64)
    o = CutMixer(layer, x, neutral=False)
    assert_equal(layer.proj(o(layer.qkv(x)[..., :24], o.kernels(x))), layer(x)[0])
    assert (o(layer.qkv(x)[..., :24], o.kernels(z)) - o(layer.qkv(x)[..., :24], o.kernels(x))).abs().max() > 1e-3


# Table 1 and the generators

def test_table1_is_the_papers():
    lines = """
        ViT              | Dynamic | Hard (all)   | [D -> N, then N -> D]                  | [1x1]
        Swin Transformer | Dynamic | Hard (local) | [D -> N, then N -> D, N = window area] | [1x1]
        Linformer        | Dynamic | Soft         | [D -> k, then k -> D]                  | [1x1]
        Dynamic Conv.    | Static  | Soft         | [D -> D, dense]                        | [k x k]
        Dynamic DW-Conv. | N/A     | N/A          | Depth-wise                             | [k x k]"""
    assert [list(row.values()) for row in table1()] == [[c.strip() for c in line.split('|')] for line in lines.strip().splitlines()]
    assert list(table1()[0])[1:] == ['Kernel Bank', 'Kernel Selection', 'Kernel Type', 'Kernel Size']


@pytest.mark.parametrize('D', [8, 24])
@pytest.mark.parametrize('k', [1, 3])
def test_generator_weights(D, k):
    assert generator_weights(GeneratedConv2d(D, k)) == k ** 2 * D ** 3
    assert generator_weights(DynamicDepthwiseConv2d(D, k, reduction=None)) == k ** 2 * D ** 2
    assert generator_weights(KernelAttention2d(D, 2, k)) == 2 * k ** 2 * D ** 2
    for attention in Attention(D, 2), DynamicConvAttention(D, 2), DynamicConvBlock(D, 2), WindowAttention(D, 2): assert generator_weights(attention) == 2 * D ** 2
    assert generator_weights(DepthwiseSelfAttention(D, 2)) == D ** 2
    with pytest.raises(ValueError, match='makes no kernels'): generator_weights(nn.Conv2d(D, D, k))


# The design space

def test_the_grid_is_complete_and_every_gap_explained():
    cells = design_space()
    in_table1 = ('all', 'local', 'soft', 'none')
    assert len(cells) == len(set(c.spec for c in cells)) == 3 * (len(in_table1) + len(further_selections())) * 3 * 2 * 7 * 3
    assert len([s for s in POSSIBLE if s.selection in in_table1]) == 140
    for name in further_selections():
        assert len([s for s in POSSIBLE if s.selection == name]) == (42 if SELECTIONS[name].looks_at_answers else 46), name
    assert {c.reason for c in cells} - {None} == {rule.reason for rule in RULES}
    for c in cells:
        if c.reason is not None and c.spec.activation in (None, 'softmax'):
            with pytest.raises(ValueError, match='cannot be built'): build(c.spec)
    published = [KernelSpec('dynamic', s, 'pair', 1, 'softmax') for s in ('all', 'local', 'soft')] + [KernelSpec('static', 'soft', 'dense', 3), KernelSpec('none', 'none', 'depthwise', 3)]
    assert all(why_not(spec) is None for spec in published)


def test_the_grid_can_be_asked_for_more():
    cells = design_space(kernel_size=(5,), activation=tuple(ACTIVATIONS), selection=('all',), bank=('dynamic',), kernel_type=('pair',), position=(None,))
    assert len(cells) == len(ACTIVATIONS) and all(c.reason is None for c in cells)
    for wrong, message in [(dict(kernel=('pair',)), 'unknown dimension'), (dict(kernel_size=(2,)), 'odd numbers'), (dict(bank=('dynamical',)), "cannot be 'dynamical'"), (dict(activation=('lnrelu',)), 'ln_relu')]:
        with pytest.raises(ValueError, match=message): design_space(**wrong)


@pytest.mark.parametrize('spec', [s for s in POSSIBLE if s.activation in (None, 'ln_relu')], ids=name_of)  # all of them: test_reference_space.py
def test_every_cell_is_built_and_does_what_its_definition_says(spec):
    torch.manual_seed(0)
    mixer = build(spec, 4, (4, 6)).double().eval()
    for p in mixer.parameters(): nn.init.normal_(p, std=.3)
    assert max(against_definition(mixer, spec, torch.randn(2, 4, 4, 6, dtype=torch.float64))) < 1e-12


@pytest.mark.parametrize('spec', [s for s in POSSIBLE if s.position != 'abs' and s.activation in (None, 'softmax', 'scaling')], ids=name_of)
def test_every_cell_is_recognised(spec):
    torch.manual_seed(0)
    found = describe(build(spec), torch.randn(1, 16, 8, 8))
    assert (next(iter(found.values())) if isinstance(found, dict) else found) == spec


def test_mixtures_of_large_kernels_are_counted():
    spec = KernelSpec('dynamic', 'soft', 'pair', 3, 'softmax', None)
    torch.manual_seed(0)
    found = describe(build(spec, 16, (4, 4), 2), torch.randn(1, 16, 4, 4))
    assert found == spec and found.num_kernels == 8


# vdc_equiv

def equiv(*args):
    code = "import sys; sys.argv[0] = 'vdc_equiv'; from vitdynconv.framework.commands import vdc_equiv; vdc_equiv()"
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, timeout=240)


def test_a_typing_error_is_answered_without_the_heavy_imports():
    code = """import sys
sys.argv = ['vdc_equiv', '--tolerance', '1']
from vitdynconv.framework.commands import vdc_equiv
try: vdc_equiv()
except SystemExit as stop: print(stop.code, [name for name in ('torch', 'timm', 'fastai') if name in sys.modules])"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == '2 []' and '--tolerance' in done.stderr



def test_every_case_agrees():
    rows = equivalence_table()
    assert len(rows) == len(all_proofs()) >= 30 and {'ViT', 'Swin', 'Linformer', 'D-Conv', 'D-DW-Conv'} <= {row['system'] for row in rows}
    for row in rows: assert max(row['outputs'], row['gradients']) < 1e-12, row
    assert rows == equivalence_table()                       # seeded


def red():
    "The rows of `vdc_equiv` that a change of the library turns red."
    return [row['computation'] for row in equivalence_table() if not max(row['outputs'], row['gradients']) < 1e-12]


@pytest.mark.parametrize('name', list(ACTIVATIONS))
def test_a_wrong_activation_turns_its_row_red(name, monkeypatch):
    "Any one formula altered: 3% larger weights, or another function of the logits. Its reference must not follow."
    cls = ACTIVATIONS[name]
    right = cls.forward
    activation_rows = [proof for proof in all_proofs() if proof.system == 'activation']
    monkeypatch.setattr('vitdynconv.framework.proofs.all_proofs', lambda: activation_rows)
    for wrong in (lambda act, logits, bias=None, mask=None: 1.03 * right(act, logits, bias, mask),
                  lambda act, logits, bias=None, mask=None: right(act, logits.exp(), bias, mask),
                  lambda act, logits, bias=None, mask=None: right(act, logits, bias, None)):
        monkeypatch.setattr(cls, 'forward', wrong)
        assert f'{name}, dynamic convs' in red()
    monkeypatch.setattr(cls, 'forward', right)
    assert red() == []


@pytest.mark.parametrize('attribute, wrong', [('f', staticmethod(torch.exp)), ('scale', 'sqrt_head_dim')])
def test_a_wrong_part_of_an_activation_turns_its_row_red(attribute, wrong, monkeypatch):
    "The defaults are judged, too: the reference does not ask the object for them."
    monkeypatch.setattr(ACTIVATIONS['scaling_relu'], attribute, wrong)
    assert red() == ['scaling_relu, dynamic convs']


def with_smaller_eps(logits, mask, eps=1e-5, right=masked_norm): return right(logits, mask, 1e-6)
def over_all_kernels(logits, mask, eps=1e-5, right=masked_norm): return right(logits, torch.ones_like(mask), eps)


@pytest.mark.parametrize('name, attribute, wrong', [
    ('relu', 'f', staticmethod(F.relu6)), ('relu6', 'f', staticmethod(F.relu)), ('softplus', 'f', staticmethod(F.softplus)), ('gelu', 'f', staticmethod(lambda s: F.gelu(s, approximate='tanh'))),
    ('scaling_relu', 'f', staticmethod(lambda s: F.leaky_relu(s, 1e-3))), ('softmax_plus_one', 'normalise', lambda act, s: F.pad(s, (0, 1), value=1.).softmax(-1)[..., :-1]),
    ('sigmoid', 'elementwise', lambda act, s, n, bias=0.: torch.sigmoid(s * act.factor + bias - math.log(s.shape[-1]))), ('ln', None, with_smaller_eps), ('ln_relu', None, over_all_kernels)],
    ids=lambda v: v if isinstance(v, str) else '')
def test_an_alteration_that_shows_only_here_and_there_turns_the_row_red(name, attribute, wrong, monkeypatch):
    "Beyond 6, beyond 20, near zero, in rows of few kernels: the proof looks there, too."
    if attribute: monkeypatch.setattr(ACTIVATIONS[name], attribute, wrong)
    else: monkeypatch.setattr('vitdynconv.layers.families.layernorm.masked_norm', wrong)
    activation_rows = [proof for proof in all_proofs() if proof.computation == f'{name}, dynamic convs']
    monkeypatch.setattr('vitdynconv.framework.proofs.all_proofs', lambda: activation_rows)
    assert red() == [f'{name}, dynamic convs']


@pytest.mark.parametrize('where, wrong, rows', [
    ('vitdynconv.layers.dconv.DynamicConv.coefficients', lambda conv, x: (conv.router(x.flatten(2).amax(2)) / conv.temperature).softmax(1), 2),
    ('vitdynconv.layers.dynconv.DynamicDepthwiseConv.kernels', lambda conv, x: conv.generator(x).unflatten(1, (conv.groups, -1)).flip(2), 4),
    ('vitdynconv.layers.depthwise.mean_kernel', lambda k, mask: k.mean(-2, keepdim=True), 3),
    ('vitdynconv.layers.selections.neighborhood.axis_neighborhood', lambda n, k, device=None: (torch.arange(n)[:, None] - torch.arange(n)).abs() <= k // 2, 2),
])
def test_a_wrong_router_generator_mean_or_selection_turns_rows_red(where, wrong, rows, monkeypatch):
    monkeypatch.setattr(where, wrong)
    assert len(red()) == rows


@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_nan_is_no_small_difference(where, monkeypatch):
    "`max` and `<` pass over NaN: right values with a gradient of NaN, and values of NaN, turn the row red."
    right = ACTIVATIONS['gelu'].forward
    row, = [proof for proof in all_proofs() if proof.computation == 'gelu, dynamic convs']
    monkeypatch.setattr('vitdynconv.framework.proofs.all_proofs', lambda: [row])

    def wrong(act, logits, bias=None, mask=None):
        zero = (logits - logits).abs()
        return right(act, logits, bias, mask) + (0 * zero.sqrt() if where == 'backward' else zero / zero)
    assert red() == []
    monkeypatch.setattr(ACTIVATIONS['gelu'], 'forward', wrong)
    assert red() == ['gelu, dynamic convs']
    assert equivalence_table()[0]['gradients'] == math.inf


def test_the_design_space_sees_a_wrong_activation(monkeypatch):
    monkeypatch.setattr(ACTIVATIONS['scaling_relu'], 'f', staticmethod(torch.exp))
    spec = KernelSpec('dynamic', 'all', 'pair', 1, 'scaling_relu')
    mixer = build(spec, 4, (4, 6)).double()
    assert min(against_definition(mixer, spec, torch.randn(1, 4, 4, 6, dtype=torch.float64))) > 1e-3


def test_the_judge_sees_a_wrong_gradient():
    x = torch.randn(3, 4, dtype=torch.float64)
    def wrong(x): return 2 * x.tanh() - x.tanh().detach()            # right values, twice the gradient
    found = reference.difference_from_reference(wrong, lambda x: np.tanh(x), dict(x=x), {})
    assert found.outputs < 1e-14 and found.gradients > 1e-3


def test_the_definitions_import_none_of_the_layers():
    source = Path(reference.__file__).read_text()
    lines = [line for line in source.splitlines() if re.match(r'(from|import) ', line)]
    assert not any('layers' in line for line in lines), lines


@pytest.mark.parametrize('kind', [DynamicConvAttention, DepthwiseSelfAttention])
def test_selections_are_told_apart(kind):
    grid = (5, 6)
    near = describe(kind(24, 3, grid_size=grid, selection=NeighborhoodKernels(3, grid)))
    assert (near.bank, near.selection, near.num_kernels) == ('dynamic', 'neighborhood', 9)
    best = describe(kind(24, 3, grid_size=grid, selection=TopKernels(7, grid)))
    assert (best.bank, best.selection, best.num_kernels) == ('dynamic', 'topk', 7)
    assert near.row()[1] == SELECTIONS['neighborhood'].words and best.row()[1] == SELECTIONS['topk'].words


class Ruled(nn.Module):
    "Nobody's self-attention, with a mask that a rule makes of the logits: nothing but its behaviour says what it selects."
    def __init__(self, rule):
        super().__init__()
        self.qkv, self.proj, self.rule = nn.Linear(24, 72), nn.Linear(24, 24), rule

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        logits = q @ k.mT / 24 ** .5
        return self.proj(logits.masked_fill(~self.rule(logits), -math.inf).softmax(-1) @ v)


def five_around(logits):
    "The five kernels around a position; at the ends of the row, the nearest five."
    n = logits.shape[-1]
    place = torch.arange(n) - (torch.arange(n) - 2).clamp(0, n - 5)[:, None]
    return (place >= 0) & (place < 5)


def five_of_the_window(logits): return torch.arange(15)[:, None] // 5 == torch.arange(15) // 5
def five_best(logits): return logits >= logits.topk(5).values[..., -1:]


@pytest.mark.parametrize('rule, selection', [(five_around, 'neighborhood'), (five_of_the_window, 'local'), (five_best, 'topk')], ids=lambda v: getattr(v, '__name__', v))
def test_selections_of_foreign_modules_are_told_apart(rule, selection):
    torch.manual_seed(2)
    spec = describe(Ruled(rule), torch.randn(1, 15, 24))
    assert (spec.bank, spec.selection, spec.num_kernels) == ('dynamic', selection, 5)


def test_cases_are_no_comparison_of_a_thing_with_itself():
    "In float32 nearly all pairs differ by rounding: the two sides are different computations."
    rows = equivalence_table(torch.float32)
    assert all(max(row['outputs'], row['gradients']) < 2e-3 for row in rows)
    same = [row['computation'] for row in rows if row['outputs'] == row['gradients'] == 0]
    assert same == ['router, mixed kernel, convolution']     # timm's CondConv2d mixes with the same product


def test_command_prints_a_table_and_writes_it(tmp_path):
    done = equiv('--csv', str(tmp_path/'e.csv'), '--json', str(tmp_path/'e.json'))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    rows = list(csv.DictReader((tmp_path/'e.csv').open()))
    assert len(rows) == len(all_proofs()) == len(json.loads((tmp_path/'e.json').read_text()))
    assert all(float(r['outputs']) < 1e-12 and float(r['gradients']) < 1e-12 and r['dtype'] == 'float64' for r in rows)
    for r in rows: assert r['computation'] in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ['e.csv', 'e.json']


def test_command_fails_when_an_equivalence_does(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop: vdc_equiv(tol=1e-18, csv=str(tmp_path/'e.csv'))
    err = capsys.readouterr().err
    assert stop.value.code == 1 and len(err.strip().splitlines()) == 1 and 'exceed 1e-18' in err
    assert (tmp_path/'e.csv').exists()


@pytest.mark.parametrize('options, message', [(dict(tol=0.), '--tol 0.0 must be above 0'), (dict(csv='/nowhere/e.csv'), '--csv /nowhere/e.csv'), (dict(json='.'), 'is a folder')])
def test_bad_input_is_one_line_before_any_work(options, message, capsys, monkeypatch):
    monkeypatch.setattr('vitdynconv.framework.proofs.equivalence_table', None)           # nothing may run
    with pytest.raises(SystemExit) as stop: vdc_equiv(**options)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and message in err and len(err.strip().splitlines()) == 1 and out == ''


def test_help_documents_every_option():
    text = equiv('--help').stdout
    assert all(re.search(rf'--{option}\b', text) for option in ('tol', 'csv', 'json')) and 'largest difference allowed' in text
