"Operations on timm's models: exact where they promise it, literal everywhere else, and the command that does them to a file."
import copy
import csv
import json
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitdynconv.layers.activations import ACTIVATIONS, create_activation
from vitdynconv.layers.attention import DynamicConvAttention
from vitdynconv.tools.testing import assert_equal, difference
from vitdynconv.layers.depthwise import DepthwiseSelfAttention
from vitdynconv.layers.equivalence import attention
from vitdynconv.models import commands
from vitdynconv.models.backbones import find_mixers
from vitdynconv.models.surgery import convert, to_timm
from vitdynconv.models.weights import timm_model

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def vit(cls=VisionTransformer, **kwargs):
    torch.manual_seed(0)
    return stirred(cls(**TINY | kwargs).double().eval())


def swin(**kwargs):
    torch.manual_seed(0)
    return stirred(SwinTransformer(**dict(img_size=(32, 48), patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, num_classes=5) | kwargs).double().eval())


def stirred(model):
    "Move all weights, so that none is zero or one."
    for p in model.parameters(): p.data += .1 * torch.randn_like(p)
    return model


def images(model, b=2):
    size = getattr(model.patch_embed, 'img_size', (224, 224))
    return torch.randn(b, 3, *size, dtype=next(model.parameters()).dtype, generator=torch.Generator().manual_seed(1))


# Softmax conversions are exact, with every gradient

def by_name(model): return dict(model.named_parameters())


@pytest.mark.parametrize('model', [vit(), vit(qk_norm=True, norm_layer='layernorm', qkv_bias=False), vit(reg_tokens=3, no_embed_class=True), vit(class_token=False, global_pool='avg'), vit(VisionTransformerDistilled),
                                   vit(img_size=(32, 48), init_values=.1), swin(), swin(img_size=(30, 44), window_size=(4, 3)), swin(head_dim=5)],
                         ids=['plain', 'qk_norm', 'registers', 'pooled', 'distilled', 'not square', 'swin', 'swin padded', 'swin head_dim'])
def test_softmax_conversion_is_exact_with_every_gradient(model):
    new, theirs = convert(model), by_name(model)
    assert not new.conversion.new and not new.conversion.dropped
    diff = difference(new, model, images(model), params=[(p, theirs[n]) for n, p in new.named_parameters()])
    assert max(diff) < 1e-12, diff


@pytest.mark.parametrize('name, size', [('swin_tiny_patch4_window7_224', 224), ('swin_tiny_patch4_window7_224', (168, 280)), ('deit_tiny_patch16_224', 224)])
def test_full_size_networks_answer_as_timm(name, size):
    torch.manual_seed(0)
    kwargs = dict(depths=(2, 2, 2, 2)) if 'swin' in name else dict(depth=4)
    model = timm.create_model(name, img_size=size, **kwargs).eval()
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    with torch.no_grad(): assert_equal(convert(model)(x), model(x), tol=1e-5)


@pytest.mark.parametrize('name', ['pit_ti_224', 'mobilevit_xxs', 'naflexvit_base_patch16_gap'])
def test_other_models_of_standard_attention_keep_their_answer(name):
    kwargs = dict(embed_dim=48, depth=2, num_heads=3) if 'naflex' in name else {}
    model = stirred(timm.create_model(name, num_classes=5, **kwargs)).eval()
    new, x = convert(model), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_equal(new(x), model(x), tol=1e-5)
        assert (convert(model, 'scaling_relu')(x) - model(x)).abs().max() > 1e-6
    assert find_mixers(new) and all(type(m) is DynamicConvAttention for m in find_mixers(new).values())
    with pytest.raises(ValueError, match='grid'): convert(model, pos='rel')


@pytest.mark.parametrize('name, culprit', [('vit_base_patch16_xp_224', 'blocks.0 is a .*ParallelScalingBlock'), ('vit_dwee_patch16_reg1_gap_256', 'blocks.0.attn is a .*DiffAttention'), ('beit_base_patch16_224', 'blocks.0.attn is a timm.models.beit.Attention'),
    ('swinv2_tiny_window8_256', r'layers.0.blocks.0.attn is a timm.models.swin_transformer_v2'), ('eva02_tiny_patch14_224', 'blocks.0.attn is a .*EvaAttention'), ('crossvit_tiny_240', 'CrossAttention'), ('resnet18', 'ResNet')])
def test_what_stops_a_conversion_is_named(name, culprit):
    with pytest.raises(ValueError, match=culprit): convert(timm.create_model(name, device='meta'))


def test_norm_or_gate_inside_attention_is_named():
    with pytest.raises(ValueError, match='blocks.0.attn is an Attention with a norm'): convert(vit(scale_attn_norm=True, norm_layer='layernorm'))


# Every other setting against a literal forward pass

def literal(m, x):
    "A converted Swin in plain tensor operations: windows by hand, masks as 0/1."
    x = m.patch_embed.norm(m.patch_embed.proj(x).permute(0, 2, 3, 1)) + getattr(m.patch_embed, 'pos_embed', 0)
    for stage in m.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            (wh, ww), (sh, sw), (b, h, w, c) = block.window_size, block.shift_size, x.shape
            y = block.norm1(x).roll((-sh, -sw), (1, 2))
            part = lambda t: t.reshape(b, h // wh, wh, w // ww, ww, -1).transpose(2, 3).reshape(b, -1, wh * ww, t.shape[-1])   # (b, windows, n, c)
            region = torch.zeros(h, w).long()
            for i, rows in enumerate([slice(0, -wh), slice(-wh, -sh or None), slice(-sh, None) if sh else slice(0, 0)]):
                for j, cols in enumerate([slice(0, -ww), slice(-ww, -sw or None), slice(-sw, None) if sw else slice(0, 0)]): region[rows, cols] = 3 * i + j
            region = part(region[None, :, :, None].expand(b, h, w, 1))[..., 0]
            seen = (region[..., None] == region[..., None, :])[:, :, None] if sh or sw else torch.ones(1, 1, 1, wh * ww, wh * ww, dtype=torch.bool)
            y = mix(block.attn, part(y), seen)
            y = y.reshape(b, h // wh, w // ww, wh, ww, c).transpose(2, 3).reshape(b, h, w, c).roll((sh, sw), (1, 2))
            x = x + y
            x = x + block.mlp(block.norm2(x))
    return m.head.fc(m.norm(x).mean((1, 2)))


def mix(a, y, seen):
    "One mixer, window by window."
    heads = lambda t: t.unflatten(3, (a.num_heads, a.head_dim)).transpose(2, 3)    # (b, windows, h, n, d)
    n = y.shape[2]
    B = torch.zeros(a.num_heads, n, n).to(y) if a.position() is None else a.position().bias()
    if isinstance(a, DepthwiseSelfAttention):
        q, k = map(heads, a.qk(y).chunk(2, -1))
        weights = (B.unflatten(0, (a.num_heads, -1)) * seen[:, :, :, None]) # (..., h, 1 or d, n, n)
        out = q * (seen.to(k) @ k / seen.sum(-1, keepdim=True)) + torch.einsum('bwhdij,bwhjd->bwhid', weights.expand(*k.shape[:3], k.shape[-1], n, n), k)
    else:
        q, k, v = map(heads, a.qkv(y).chunk(3, -1))
        out = a.act(q @ k.mT, bias=B, mask=seen.expand(*q.shape[:3], n, n)) @ v
    return a.proj(out.transpose(2, 3).flatten(3))


@pytest.mark.parametrize('setting', [dict(activation=a, pos=p) for a in ('softmax', 'none', 'scaling', 'scaling_relu', 'ln', 'ln_relu', 'sigmoid') for p in ('rel', 'abs')]
                         + [dict(kernel='depthwise', pos='rel'), dict(kernel='depthwise', pos='rel', pos_per='channel'), dict(kernel='depthwise', pos='none')], ids=lambda s: ' '.join(s.values()))
def test_shifted_windows_compute_what_the_paper_says(setting):
    m = stirred(convert(swin(), **setting))
    diff = difference(m, lambda x: literal(m, x), images(m, 1), params=[(p, p) for p in m.parameters()])
    assert max(diff) < 1e-10, diff


# What is kept

@settings(max_examples=25, deadline=None, derandomize=True)
@given(activation=st.sampled_from(list(ACTIVATIONS)), kernel=st.sampled_from(['pair', 'depthwise']), pos=st.sampled_from([None, 'abs', 'rel', 'none']), token=st.sampled_from([None, True, False]), source=st.sampled_from(['vit', 'registers', 'pooled', 'swin']))
def test_every_weight_has_its_fate(activation, kernel, pos, token, source):
    model = dict(vit=vit, registers=lambda: vit(reg_tokens=2), pooled=lambda: vit(class_token=False, global_pool='avg'), swin=swin)[source]()
    if kernel == 'depthwise': activation = 'scaling'
    if source == 'swin': token = None
    before = copy.deepcopy(model.state_dict())
    new = convert(model, activation, kernel, pos, token)
    done, after = new.conversion, new.state_dict()
    assert sorted(done.kept + done.new) == sorted(after) and all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    for w in done.weights:
        old = before.get(w.source or w.name)
        if w.fate == 'kept' and not w.note: assert torch.equal(after[w.name], old)
        if w.fate == 'dropped': assert w.name in before and (w.name not in after or after[w.name].shape != before[w.name].shape)
        if 'rows of query' in w.note: assert torch.equal(after[w.name], old[:len(after[w.name])])
    assert set(before) == {w.source or w.name for w in done.weights if w.fate != 'new'}
    assert torch.isfinite(new(images(new))).all() and str(done).splitlines()[-1].startswith(f'{len(done.kept)} kept')


def test_frozen_weights_stay_frozen_and_training_mode_stays():
    model = vit().train()
    for p in model.blocks[0].parameters(): p.requires_grad_(False)
    new = convert(model, 'ln', pos='rel')
    frozen = {n for n, p in new.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in by_name(model) if n.startswith('blocks.0.')} and all(m.training for m in new.modules())


def test_an_activation_module_is_copied_into_every_block():
    act = create_activation('ln', num_kernels=17, head_dim=8)
    new = convert(vit(), act)
    assert len({id(b.attn.act) for b in new.blocks} | {id(act)}) == 3


def test_converting_twice_ends_where_converting_once_does():
    model = vit()
    once, twice = convert(model, 'softmax', class_token=False), convert(convert(model, 'scaling'), 'softmax', class_token=False)
    assert_equal(twice(images(model)), once(images(model)))
    again, direct = convert(convert(swin(), 'ln', pos='none'), 'scaling'), convert(swin(), 'scaling', pos='none')
    assert_equal(again(images(direct)), direct(images(direct)))


def test_options_reach_the_activation():
    model = vit()
    options = dict(scale='num_kernels')
    m = convert(model, 'scaling', activation_options=options)
    assert m.blocks[0].attn.act.scale == 'num_kernels' and (m(images(m)) - convert(model, 'scaling')(images(m))).abs().max() > 1e-6


def test_the_definition_can_be_asked_for():
    model = vit()
    slow = convert(model, 'ln_relu', pos='rel', backend=attention)
    assert all(b.attn.backend is attention for b in slow.blocks)
    fast = convert(model, 'ln_relu', pos='rel')
    fast.load_state_dict(slow.state_dict())
    assert fast.blocks[0].attn.backend is not attention
    assert_equal(fast(images(model)), slow(images(model)), tol=1e-11)


# Sizes

@pytest.mark.parametrize('setting', [dict(activation='ln_relu', pos='rel'), dict(kernel='depthwise', pos='rel', class_token=False), dict(pos='abs'), dict(activation='scaling', pos='rel')], ids=lambda s: ' '.join(map(str, s.values())))
def test_any_size_answers_as_a_model_moved_there(setting):
    fixed, dynamic = stirred(convert(vit(), **setting).float()), convert(vit(dynamic_img_size=True), **setting).float()
    dynamic.load_state_dict(fixed.state_dict())
    for size in (32, 32), (48, 64), (24, 40):
        moved = copy.deepcopy(fixed)
        moved.set_input_size(size)
        x = torch.randn(2, 3, *size)
        assert_equal(dynamic(x), moved(x), tol=1e-5)
    dynamic(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in dynamic.blocks[0].attn.named_parameters() if n in ('relative_position_bias_table', 'act.weight', 'qkv.weight', 'qk.weight'))


def test_swin_moves_as_timm_moves():
    model = swin().float()
    new = convert(model)
    for net in model, new: net.set_input_size((48, 64), window_size=(6, 8))
    assert new.layers[0].blocks[1].attn.relative_position_bias_table.shape == (11 * 15, 2)
    assert_equal(new(images(new)), model(images(model)), tol=1e-5)
    there = convert(swin(), 'ln', pos='abs').float()
    there.set_input_size((48, 64), window_size=(6, 8))
    assert there.patch_embed.pos_embed.shape == (1, 24, 32, 12) and there.layers[0].blocks[0].attn.act.weight.shape == (48,) and torch.isfinite(there(images(there))).all()


# And back

@pytest.mark.parametrize('model', [vit(), vit(qk_norm=True, norm_layer='layernorm', reg_tokens=1), vit(VisionTransformerDistilled), swin(), swin(head_dim=5)], ids=['vit', 'qk_norm', 'distilled', 'swin', 'swin head_dim'])
def test_back_to_timm_bit_by_bit(model):
    back = to_timm(convert(model))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()] and not hasattr(back, 'conversion')
    assert back.state_dict().keys() == model.state_dict().keys() and all(torch.equal(w, model.state_dict()[n]) for n, w in back.state_dict().items())
    assert_equal(back(images(model)), model(images(model)))


@pytest.mark.parametrize('model, setting, reason', [(vit(), dict(activation='ln_relu'), "blocks.0.attn has the activation 'ln_relu'"), (vit(), dict(pos='rel'), 'blocks.0.attn has a relative position table'), (swin(), dict(kernel='depthwise'), 'layers.0.blocks.0.attn is depth-wise'),
    (swin(), dict(pos='abs'), 'patch_embed adds an absolute position'), (vit(), dict(activation_options=dict(temperature=2.)), 'temperature 2')], ids=['activation', 'rel', 'depthwise', 'abs', 'temperature'])
def test_no_way_back_is_explained(model, setting, reason):
    with pytest.raises(ValueError, match=reason): to_timm(convert(model, **setting))


@pytest.mark.parametrize('setting, message', [(dict(activation='lnrelu'), 'ln_relu'), (dict(kernel='diagonal'), "'pair', 'depthwise'"), (dict(pos='relative'), "'rel'"), (dict(class_token='no'), 'True, False'),
    (dict(kernel='depthwise', activation='ln'), 'Eq. 5'), (dict(pos_per='channel'), "kernel='depthwise'"), (dict(activation='scaling', activation_options=dict(scale='d')), 'head_dim')], ids=lambda s: str(s)[:40])
def test_wrong_settings_get_the_right_ones_named(setting, message):
    with pytest.raises(ValueError, match=message): convert(vit(), **setting)


def test_tokens_and_places_that_do_not_go_together():
    with pytest.raises(ValueError, match='Swin'): convert(swin(), class_token=True)
    with pytest.raises(ValueError, match='distill'): convert(vit(VisionTransformerDistilled), class_token=False)
    with pytest.raises(ValueError, match='patch_drop_rate=0'): convert(vit(patch_drop_rate=.5), pos='rel')


# The command

def vdc_convert(*args):
    code = 'import sys; from vitdynconv.models.commands import vdc_convert; sys.argv[0] = "vdc_convert"; vdc_convert()'
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], capture_output=True, text=True, timeout=300)


def test_the_command_converts_a_file_and_reports_each_weight(tmp_path):
    torch.manual_seed(0)
    old = timm.create_model('deit_tiny_patch16_224', num_classes=3)
    torch.save({'state_dict': {f'module.{n}': w for n, w in old.state_dict().items()}}, tmp_path/'old.pth')
    out, table, data = tmp_path/'new.safetensors', tmp_path/'fate.csv', tmp_path/'fate.json'
    run = vdc_convert('--model', 'deit_tiny_patch16_224', '--activation', 'ln_relu', '--pos', 'rel', '--class_token', 'no', '--checkpoint', tmp_path/'old.pth', '--out', out, '--csv', table, '--json', data)
    assert run.returncode == 0, run.stderr
    new, rows = load_file(out), list(csv.DictReader(table.open()))
    expected = convert(old, 'ln_relu', pos='rel', class_token=False)
    assert {r['name']: r['fate'] for r in rows} == {w.name: w.fate for w in expected.conversion.weights} and len(json.loads(data.read_text())) == len(rows)
    assert new.keys() == expected.state_dict().keys() and all(torch.equal(new[r['name']], old.state_dict()[r['source'] or r['name']]) for r in rows if r['fate'] == 'kept')
    assert 'pos_embed' in run.stdout and f'{len(expected.conversion.new)} new' in run.stdout
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path/'junk.pth').write_bytes(b'junk')
    out = ('--out', tmp_path/'new.safetensors')
    for args in [('--activation', 'lnrelu', *out), ('--model', 'resnet18', *out), ('--checkpoint', tmp_path/'junk.pth', *out), ('--out', tmp_path/'no/new.safetensors')]:
        monkeypatch.setattr(sys, 'argv', ['vdc_convert', *map(str, args)])
        with pytest.raises(SystemExit) as stop: commands.vdc_convert()
        said = capsys.readouterr()
        assert stop.value.code == 2 and not said.out and said.err.startswith('vdc_convert: ') and said.err.count('\n') == 1, (args, said)
    run = vdc_convert('--checkpoint', tmp_path/'junk.pth', *out)                     # and as a process of its own
    assert run.returncode == 2 and run.stderr.startswith('vdc_convert: ') and run.stderr.count('\n') == 1, run
    assert [p.name for p in tmp_path.iterdir()] == ['junk.pth']


def test_weights_that_cannot_be_had_are_said_to_be_so(monkeypatch, tmp_path):
    monkeypatch.setattr(timm, 'create_model', lambda *a, **k: (_ for _ in ()).throw(OSError('no route to host')))
    with pytest.raises(ConnectionError, match='no route to host.*checkpoint=FILE'): timm_model('deit_tiny_patch16_224', pretrained=True)
    monkeypatch.undo()
    torch.save({'fc.weight': torch.zeros(2, 2)}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match='does not fit'): timm_model('deit_tiny_patch16_224', checkpoint=tmp_path/'other.pth')
    with pytest.raises(ValueError, match='there is no file'): timm_model('deit_tiny_patch16_224', checkpoint=tmp_path/'none.pth')
    with pytest.raises(ValueError, match='deit_tiny'): timm_model('deit_tyni_patch16_224')
