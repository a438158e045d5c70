"The counts as a user gets them: `vdc_cost`, models of all kinds, and the property that formulas and measurements are equal."
import csv, json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from fastai.basics import DataLoaders, Learner
from hypothesis import given, settings, strategies as st
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitdynconv.layers.activations import ACTIVATIONS
from vitdynconv.models import commands
from vitdynconv.models.cost import Cost, analyse, count, peak_memory, without_memory
from vitdynconv.models.formulas import swin_cost, vit_cost
from vitdynconv.fast.dispatch import accelerate
from vitdynconv.models.surgery import convert

COLUMNS = ('base,activation,kernel,pos,gflops,mparams,macts,correction,gflops_reconciled,mparams_reconciled,macts_reconciled,'
           'paper_gflops,paper_mparams,paper_macts').split(',')
PAPER = """4.608 22.051 11.947|4.366 22.051 9.448|3.902 20.277 7.337|4.608 22.028 11.947|4.543 22.028 10.351|4.079 20.253 8.241|17.582 86.568 23.895|17.582 86.521 23.895
15.830 79.434 16.481|4.508 28.288 17.054|4.508 28.288 17.054|4.141 26.850 14.112|15.467 87.768 36.625|15.468 87.768 38.930|14.192 80.777 30.256""".replace('\n', '|').split('|')


def vdc_cost(*args):
    "Run the command as a user does."
    code = 'import sys; from vitdynconv.models.commands import vdc_cost; sys.argv[0] = "vdc_cost"; vdc_cost()'
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], capture_output=True, text=True, timeout=300)


def total(cost): return sum(cost.values(), Cost())


@pytest.fixture(scope='module')
def table3(tmp_path_factory):
    "Table 3 as text, CSV and JSON, counted once."
    folder = tmp_path_factory.mktemp('cost')
    run = vdc_cost('--table', 3, '--csv', folder / 'table3.csv', '--json', folder / 'table3.json')
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(folder)) == ['table3.csv', 'table3.json']
    with open(folder / 'table3.csv') as file: rows = list(csv.DictReader(file))
    return SimpleNamespace(text=run.stdout, rows=rows, data=json.loads((folder / 'table3.json').read_text()))


def test_table3_columns_and_digits(table3):
    assert len(table3.rows) == len(table3.data) == 15 and len(table3.text.splitlines()) == 16
    for row in table3.rows:
        assert list(row) == COLUMNS
        for name in set(COLUMNS) - {'base', 'activation', 'kernel', 'pos', 'correction'}: assert len(row[name].split('.')[1]) >= 6


def test_table3_agrees_with_the_paper(table3):
    missed = []
    for row, data, paper in zip(table3.rows, table3.data, PAPER):
        for unit, printed in zip(('gflops', 'mparams', 'macts'), paper.split()):
            assert float(row[f'paper_{unit}']) == float(printed)
            assert float(row[unit]) == pytest.approx(data[unit], abs=1e-9)
            ours = float(row[f'{unit}_reconciled'])
            if f'{ours:.3f}' != printed: missed.append((row['base'], row['kernel'], unit, ours / float(printed) - 1))
            changed = abs(ours - float(row[unit])) > 1e-9
            assert not changed or row['correction']
    assert [m[:3] for m in missed] == [('deit_b', 'depthwise', 'gflops')] and abs(missed[0][3]) < 3e-4


def test_a_model_of_ours_on_the_command_line(tmp_path):
    run = vdc_cost('--model', 'vdc_swin_tiny_patch4_window7_224', '--activation', 'scaling', '--kernel', 'depthwise', '--input-size', 448, '--form', 'literal', '--json', tmp_path / 'cost.json')
    assert run.returncode == 0, run.stderr
    row, = json.loads((tmp_path / 'cost.json').read_text())
    expected = total(swin_cost(activation='scaling', kernel='depthwise', img_size=448))
    assert (row['gflops'], row['mparams'], row['macts']) == (expected.gflops, expected.mparams, expected.macts)
    assert f'{expected.gflops:.3f}' in run.stdout


@pytest.mark.parametrize('args, said', [
    (('--model', 'vdc_deit_smal_patch16_224'), 'vdc_deit_small_patch16_224'), (('--table', 4), 'choose one of 3'), ((), 'either --table 3 or --model'),
    (('--model', 'deit_tiny_patch16_224', '--activation', 'lnrelu'), 'ln_relu'), (('--model', 'deit_tiny_patch16_224', '--convention', 'mine'), 'products'),
    (('--model', 'deit_tiny_patch16_224', '--input-size', 'large'), 'large'), (('--model', 'deit_tiny_patch16_224', '--form', 'quick'), 'merged')])
def test_bad_input_is_one_line_and_no_file(args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['vdc_cost', *map(str, args), '--csv', str(tmp_path / 'rows.csv')])
    with pytest.raises(SystemExit) as stop: commands.vdc_cost()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == '' and len(err.splitlines()) == 1, err
    assert err.startswith('vdc_cost: ') and said in err
    assert os.listdir(tmp_path) == []


names = st.sampled_from(['softmax', 'none', 'scaling', 'scaling_relu', 'ln', 'ln_relu'])

@settings(max_examples=25, deadline=None)
@given(names, st.sampled_from(['pair', 'depthwise']), st.sampled_from(['abs', 'rel']), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 5), st.data())
def test_vit_formula_is_the_measurement(activation, kernel, pos, class_token, merged, head, layernorm, data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    heads, patch = draw(1, 4), draw(1, 9)
    sizes = dict(img_size=patch * draw(1, 8), patch_size=patch, embed_dim=heads * draw(1, 9), depth=draw(1, 3), num_heads=heads, mlp_ratio=draw(1, 5), num_classes=draw(1, 20), in_chans=draw(1, 4))
    if kernel == 'depthwise': activation = 'scaling'
    model = convert(VisionTransformer(**sizes, qkv_bias=True), activation, kernel, pos, class_token)
    measured = count(model, head=head, layernorm=layernorm, form='merged' if merged else 'literal').total
    linear = activation in ('none', 'scaling')
    assert measured == total(vit_cost(**sizes, activation=activation, kernel=kernel, pos=pos, class_token=class_token, merged=merged and linear, head=head, layernorm=layernorm))


@settings(max_examples=25, deadline=None)
@given(names, st.sampled_from(['pair', 'depthwise']), st.sampled_from(['abs', 'rel']), st.booleans(), st.booleans(), st.integers(0, 5), st.data())
def test_swin_formula_is_the_measurement(activation, kernel, pos, per_channel, head, layernorm, data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    stages, heads, patch = draw(1, 3), draw(1, 3), draw(1, 3)
    sizes = dict(img_size=patch * 2 ** (stages - 1) * draw(1, 8), patch_size=patch, window_size=draw(1, 5), embed_dim=2 * heads * draw(1, 4), depths=[draw(1, 3) for _ in range(stages)],
                 num_heads=[heads] * stages, mlp_ratio=draw(1, 5), num_classes=draw(1, 20), in_chans=draw(1, 4))
    per_channel = per_channel and kernel == 'depthwise'
    if kernel == 'depthwise': activation = 'scaling'
    model = convert(SwinTransformer(**sizes), activation, kernel, pos, pos_per='channel' if per_channel else 'head')
    measured = count(model, head=head, layernorm=layernorm, form='literal').total
    assert measured == total(swin_cost(**sizes, activation=activation, kernel=kernel, pos=pos, per_channel=per_channel, head=head, layernorm=layernorm))


def test_fused_attention_costs_what_it_fuses():
    model = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=1)
    fused = count(model).total
    model.blocks[0].attn.fused_attn = False
    assert count(model).total == fused == total(vit_cost(img_size=64, embed_dim=192, num_heads=3, depth=1))


def test_an_operator_without_a_rule_is_an_error():
    class Orthogonal(nn.Module):
        def forward(self, x): return torch.linalg.qr(x).Q
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return torch.linalg.qr(x).Q
    class Hides(nn.Module):
        def forward(self, x): return Hidden.apply(x)
    for module in (Orthogonal(), Hides()):
        with pytest.raises(ValueError, match='aten::linalg_qr'): analyse(module, torch.eye(3))
    with pytest.raises(ValueError, match='aten::lstm'): count(timm.create_model('sequencer2d_s'), 64)


def test_products_are_counted_whatever_they_are_called():
    a, b, w = torch.ones(2, 3, 5), torch.ones(2, 5, 7), torch.ones(6, 4, 3, 3)
    for f, macs, acts in [(lambda: a @ b, 2 * 3 * 5 * 7, 42), (lambda: torch.bmm(a, b), 210, 42), (lambda: torch.baddbmm(torch.ones(2, 3, 7), a, b), 210, 42),
                          (lambda: torch.einsum('bij,bjk->bik', a, b), 210, 42), (lambda: a[0] @ b, 210, 42), (lambda: a @ b[0], 210, 42), (lambda: a[0] @ b[0, :, 0], 15, 3),
                          (lambda: torch.addmm(torch.ones(7), a[0], b[0]), 105, 21), (lambda: F.linear(a, torch.ones(4, 5)), 120, 24),
                          (lambda: F.conv2d(torch.ones(1, 8, 9, 9), w, groups=2, padding='same'), 81 * 6 * 4 * 9, 81 * 6),
                          (lambda: F.conv2d(torch.ones(1, 8, 9, 9), w, groups=2, padding=1), 81 * 6 * 4 * 9, 81 * 6),
                          (lambda: F.scaled_dot_product_attention(a, a, a), 2 * 2 * 9 * 5, 2 * (9 + 15))]:
        class Module(nn.Module):
            def forward(self, x): return f() + x
        found = analyse(Module(), torch.zeros(1))['']
        assert (sum(n for (what, _), n in found.items() if what == 'macs'), sum(n for (what, _), n in found.items() if what == 'acts')) == (macs, acts)


def test_a_learner_is_counted_by_its_model_and_left_as_it_was():
    model = convert(timm.create_model('vit_tiny_patch16_224', img_size=64, depth=2), 'scaling', pos='rel')
    model.blocks[0].eval()
    before = [m.training for m in model.modules()], [m.backend for m in model.modules() if hasattr(m, 'backend')], {n: p.clone() for n, p in model.state_dict().items()}
    learner = Learner(DataLoaders([], []), model, loss_func=nn.CrossEntropyLoss())
    assert count(learner, form='literal').total == count(model, 64, form='literal').total
    assert [m.training for m in model.modules()] == before[0] and [m.backend for m in model.modules() if hasattr(m, 'backend')] == before[1]
    assert all(torch.equal(p, before[2][n]) for n, p in model.state_dict().items())
    with pytest.raises(ValueError, match='img_size'): count(model, 96)
    assert [m.training for m in model.modules()] == before[0]


def test_modules_and_operators_add_up():
    found = count(timm.create_model('swin_tiny_patch4_window7_224'), head=True)
    assert found.total == total({op: c for op, c in found.operators.items()}) + Cost(params=found.total.params)
    children = [c for name, c in found.modules.items() if name and '.' not in name]
    assert sum(children, Cost()) == found.total
    assert found.modules['head.fc'] == Cost(768 * 1000, 769 * 1000, 1000)
    assert count(timm.create_model('swin_tiny_patch4_window7_224')).modules['head'] == Cost(0, 769 * 1000, 0)


@pytest.mark.parametrize('name', ['resnet18', 'convnextv2_atto', 'mobilenetv3_small_050', 'xcit_nano_12_p16_224', 'pvt_v2_b0', 'volo_d1_224', 'mobilevit_xxs', 'deit_tiny_distilled_patch16_224'])
def test_other_architectures(name):
    "Products as PyTorch's own counter has them, and what convolutions and linear layers write as hooks see it."
    model, written, products = timm.create_model(name).eval(), [], 'convolution linear matmul scaled_dot_product_attention'.split()
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): m.register_forward_hook(lambda m, x, y: written.append(y.numel()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter: model(torch.zeros(1, *model.default_cfg['input_size']))
    acts = sum(written)
    found = count(timm.create_model(name), head=True)
    assert sum(found.operators[kind].macs for kind in products if kind in found.operators) == counter.get_total_flops() // 2
    assert found.operators['convolution'].acts + found.operators['linear'].acts == acts
    assert found.total.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', ['vdc_deit_tiny_patch16_224', 'vdc_swin_tiny_patch4_window7_224', 'vdc_convnext_atto']
                         + [f'vdc_{system}_{body}' for system in ('dconv', 'ddwconv', 'linformer') for body in ('deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224')])
def test_a_model_on_the_meta_device_costs_the_same(name):
    kwargs = dict(embed_dim=24, depths=(1, 2), num_heads=(1, 2), img_size=56) if 'swin' in name else dict(depth=2, embed_dim=48) if 'deit' in name else dict(depths=(1,) * 4, dims=(8, 16, 24, 32))
    with torch.device('meta'): planned = timm.create_model(name, **kwargs)
    forms = ['as is', 'literal'] if name == 'vdc_deit_tiny_patch16_224' else ['as is']
    for form in forms: assert count(planned, form=form) == count(timm.create_model(name, **kwargs), form=form)
    assert all(p.is_meta for p in planned.parameters())


def test_weights_that_are_shared_stay_shared_without_memory():
    with torch.device('meta'): model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    copied = without_memory(model)
    assert copied[2].weight is copied[0].weight and copied[0].weight.untyped_storage().nbytes() == 4 and model[0].weight.is_meta
    assert copied(torch.ones(1, 4)).tolist() == [[0.] * 4]


def test_peak_memory_of_known_tensors():
    def run():
        for n in (1, 3, 2): torch.empty(n, 1024, 1024)
    assert peak_memory(run) == 3 * 4 * 2 ** 20
    x = torch.ones(256, 256)
    assert peak_memory(lambda: (x @ x) @ x) == 2 * 4 * 256 ** 2


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_all_activations_have_a_count(name):
    "All but LayerNorm are free, and all but LayerNorm have no parameters for a kernel."
    model = convert(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1), name, pos='rel', class_token=False)
    softmax = total(vit_cost(img_size=32, embed_dim=192, num_heads=3, depth=1, pos='rel', class_token=False))
    normalised = name in ('ln', 'ln_relu')
    expected = softmax + (Cost(4 * 3 * 4 * 4, 2 * 4) if normalised else Cost())   # 4 for each of the logits of 3 heads and 4 x 4 tokens
    assert count(model, form='literal').total == expected


@pytest.mark.parametrize('base', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
@pytest.mark.parametrize('activation, kernel', [('softmax', 'pair'), ('scaling', 'pair'), ('scaling_relu', 'pair'), ('ln', 'pair'), ('ln_relu', 'pair'), ('sparsemax', 'pair'), ('scaling', 'depthwise')])
@pytest.mark.parametrize('pos, pos_per', [('abs', 'head'), ('rel', 'head'), ('rel', 'channel')])
def test_fast_evaluations_have_a_count(base, activation, kernel, pos, pos_per):
    """Each operator of the fast evaluations has a rule, and the count is that of the formulas. `Q (K'V)` saves on maps without a mask, by hand;
    with LayerNorm in closed form it takes four products of n d d, and the shift one of n d. All else costs what the definition does."""
    if pos_per == 'channel' and kernel == 'pair': pytest.skip('kernels for pairs have one table per head')
    sizes = dict(img_size=112, depths=(1, 2), num_heads=(3, 6)) if 'swin' in base else dict(img_size=352, depth=1)
    with torch.device('meta'): body = timm.create_model(base, **sizes)
    model = accelerate(convert(body, activation, kernel, pos, pos_per=pos_per))
    settings = dict(activation=activation, kernel=kernel, pos=pos)
    if 'swin' in base: literal, maps = total(swin_cost(**sizes, per_channel=pos_per == 'channel', **settings)), [(16, 49, 3, 32), (4, 49, 6, 32)]
    else: literal, maps = total(vit_cost(**sizes, embed_dim=192, num_heads=3, tables=192 if pos_per == 'channel' else None, **settings)), [(1, 485, 3, 64)]
    change = Cost()
    for windows, n, h, d in maps if activation in ('scaling', 'ln') and kernel == 'pair' else []:   # the third block of the Swin is shifted, so masked
        pairs, position = Cost(-2 * n * n * d - 4 * n * n * (activation == 'ln'), 0, -n * n - n * d), Cost(n * n * d, 0, n * d)
        products = Cost(2 * n * d * d, 0, d * d + n * d) if activation == 'scaling' else Cost(4 * n * d * d + n * d, 0, 2 * d * d + 2 * n * d + d)
        change = change + windows * h * (pairs + products + (position if pos == 'rel' else Cost()))
    assert count(model).total == literal + change
