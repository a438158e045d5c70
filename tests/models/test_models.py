"Models by name, and everything that a user of timm does with one."
import copy
import pickle
import warnings
from functools import partial

import pytest
import timm
import timm.optim
import torch

from vitdynconv.tools.testing import assert_equal
from vitdynconv.models.paper import TABLE2, TABLE3
from vitdynconv.layers.dconv import DynamicConv2d, anneal
from vitdynconv.models.backbones import find_mixers
from vitdynconv.models.registry import BASES, create_model, paper_model
from vitdynconv.models.adapters.swin import DynamicConvSwin
from vitdynconv.models.surgery import convert, to_timm
from vitdynconv.models.systems import SYSTEMS, exchange
from vitdynconv.models.adapters.vit import DynamicConvViT

VIT = dict(embed_dim=24, depth=3, num_heads=3, img_size=32, patch_size=8, num_classes=5)
SWIN = dict(embed_dim=12, depths=(1, 2), num_heads=(2, 3), img_size=56, num_classes=5, drop_path_rate=0.)
CONVNEXT = dict(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), img_size=64, num_classes=5)
PYRAMID = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(2, 4), strides=(1, 2), img_size=64, num_classes=5)
DEIT, SWIN_T = 'deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'
ZOO = {'deit softmax': partial(create_model, DEIT, **VIT), 'deit scaling rel': partial(create_model, DEIT, 'scaling', pos='rel', **VIT),
       'deit ln_relu rel, no token': partial(create_model, DEIT, 'ln_relu', pos='rel', class_token=False, **VIT), 'deit sparsemax rel': partial(create_model, DEIT, 'sparsemax', pos='rel', **VIT),
       'deit depthwise rel': partial(create_model, DEIT, kernel='depthwise', pos='rel', **VIT), 'distilled rel': partial(create_model, 'deit_tiny_distilled_patch16_224', pos='rel', **VIT),
       'swin softmax': partial(create_model, SWIN_T, **SWIN), 'swin scaling_relu abs': partial(create_model, SWIN_T, 'scaling_relu', pos='abs', **SWIN), 'swin ln': partial(create_model, SWIN_T, 'ln', **SWIN),
       'swin depthwise': partial(create_model, SWIN_T, kernel='depthwise', pos_per='channel', **SWIN)}
ZOO |= {f'{s} deit': partial(create_model, f'{s}_{DEIT}', **VIT) for s in SYSTEMS} | {f'{s} swin': partial(create_model, f'{s}_{SWIN_T}', **SWIN) for s in SYSTEMS}
ZOO |= {'convnext scaling rel': partial(create_model, 'convnext_atto', 'scaling', pos='rel', selection='all', **CONVNEXT), 'convnext ln_relu': partial(create_model, 'convnext_atto', 'ln_relu', selection='all', **CONVNEXT),
        'convnext depthwise': partial(create_model, 'convnext_atto', kernel='depthwise', pos='rel', pos_per='channel', **CONVNEXT)}
ZOO |= {f'{s} convnext': partial(create_model, f'{s}_convnext_atto', **CONVNEXT) for s in SYSTEMS}
everywhere = pytest.mark.parametrize('make', ZOO.values(), ids=ZOO)
BEYOND = {f'{kind} {body}': partial(create_model, f'{kind}_{name}', **sizes) for kind in ('k3', 'topk', 'neighborhood', 'window')
          for body, name, sizes in [('deit', DEIT, VIT), ('swin', SWIN_T, SWIN), ('convnext', 'convnext_atto', CONVNEXT)]
          if kind != {'convnext': 'k3', 'swin': 'window', 'deit': 'neighborhood'}[body]}   # windows and convolutions that a body has already; a class token has no neighborhood
BEYOND |= {'pyramid': partial(create_model, 'pyramid_tiny', **PYRAMID), 'pyramid ln rel': partial(create_model, 'pyramid_tiny', 'ln', pos='rel', **PYRAMID),
           'pyramid depthwise rel': partial(create_model, 'pyramid_tiny', kernel='depthwise', pos='rel', **PYRAMID), 'mixers': partial(create_model, 'vit_tiny_mixers_wide', num_classes=5),
           'depthwise mixers': partial(create_model, 'vit_tiny_depthwise_mixers_wide', num_classes=5)}
and_beyond = pytest.mark.parametrize('make', [*ZOO.values(), *BEYOND.values()], ids=[*ZOO, *BEYOND])
pick = lambda *names: pytest.mark.parametrize('make', [ZOO[n] for n in names], ids=names)


def built(make, **kwargs):
    torch.manual_seed(0)
    return make(**kwargs).eval()


def size_of(model): return model.patch_embed.img_size if hasattr(model, 'patch_embed') else model.img_size


def images(model, b=2): return torch.randn(b, 3, *size_of(model), generator=torch.Generator().manual_seed(b))


# Names

def test_the_registry_has_every_network_of_the_paper_and_timm_finds_it():
    names = set(timm.list_models('vdc_*'))
    assert {f'vdc_{kind}' for kind in BASES} <= names
    assert {f'vdc_deit_{s}_patch16_224' for s in ('tiny', 'small', 'base')} | {f'vdc_swin_{s}_patch4_window7_224' for s in ('tiny', 'small', 'base')} <= names
    assert {f'vdc_{system}_{body}' for system in SYSTEMS for body in (DEIT, SWIN_T)} <= names
    by_timm = timm.create_model(f'vdc_{DEIT}', activation='ln_relu', pos='rel', class_token=False, **VIT)
    assert type(by_timm) is DynamicConvViT and by_timm.blocks[0].attn.act.name == 'ln_relu' and by_timm.cls_token is None and by_timm.pos_embed is None
    assert type(timm.create_model(f'vdc_{SWIN_T}', **SWIN)) is DynamicConvSwin


@pytest.mark.parametrize('name', ['deit_small_patch16_224', 'vit_base_patch16_384', SWIN_T])
def test_pretrained_configurations_are_timms(name):
    for tagged in [n for n in timm.list_pretrained(f'{name}.*')]:
        ours, theirs = timm.get_pretrained_cfg(f'vdc_{tagged}').to_dict(), timm.get_pretrained_cfg(tagged).to_dict()
        assert ours.pop('architecture') == f'vdc_{theirs.pop("architecture")}' and ours == theirs
    model = create_model(name, device='meta')
    assert timm.data.resolve_data_config(model=model) == timm.data.resolve_data_config(model=timm.create_model(name, device='meta'))


def test_names_that_are_not_there_get_close_ones():
    with pytest.raises(ValueError, match='deit_small_patch16_224'): create_model('deit_smal_patch16_224')
    with pytest.raises(ValueError, match='dconv_swin_tiny_patch4_window7_224'): create_model('dconv_swin_tiny')
    before = timm.list_models('vdc_*')
    with pytest.raises(ValueError, match='ParallelScalingBlock'): create_model('vit_base_patch16_xp_224')
    assert timm.list_models('vdc_*') == before
    assert create_model('vit_little_patch16_reg1_gap_256', 'scaling', pos='rel', depth=1).num_prefix_tokens == 1       # not in BASES, entered when asked for


@pytest.mark.parametrize('wrong, message', [(dict(activation='lnrelu'), 'ln_relu'), (dict(pos='relative'), "'rel'"), (dict(kernel='thick'), "'depthwise'")], ids=['activation', 'pos', 'kernel'])
def test_wrong_settings_name_the_right_ones(wrong, message):
    with pytest.raises(ValueError, match=message): create_model(DEIT, **wrong, **VIT)


def test_settings_that_a_system_lacks_are_refused():
    with pytest.raises(ValueError, match='kernel_size'): create_model(f'dconv_{DEIT}', activation='ln', **VIT)
    with pytest.raises(ValueError, match='none'): create_model(f'linformer_{DEIT}', pos='rel', **VIT)
    with pytest.raises(ValueError, match='class token'): create_model(f'ddwconv_{DEIT}', class_token=True, **VIT)
    with pytest.raises(ValueError, match='linformer'): exchange(timm.create_model(DEIT, **VIT), 'performer')
    assert create_model(f'dconv_{DEIT}', num_kernels=2, kernel_size=5, **VIT).blocks[0].attn.conv.weight.shape == (2, 24, 24, 5, 5)
    assert create_model(f'linformer_{DEIT}', 'ln', num_kernels=7, **VIT).blocks[0].attn.act.weight.shape == (7,)


# The tables

@pytest.mark.parametrize('row', TABLE3, ids=lambda r: ' '.join([r['base'], r['activation'], r['kernel'], r['pos']]))
def test_table_3_rows_have_the_size_that_the_paper_prints(row):
    model = paper_model(row['base'], row['activation'], row['kernel'], row['pos'], device='meta')
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.3f}' == f'{float(row["mparams"]):.3f}'


@pytest.mark.parametrize('row', TABLE2, ids=lambda r: ' '.join(map(str, r.values())))
def test_table_2_rows_have_the_parts_that_they_name(row):
    model = paper_model(row['base'], row['activation'], pos=row['pos'], class_token=row['class_token'] if row['base'] == 'deit_s' else None, device='meta')
    names, mixers = [n for n, _ in model.named_parameters()], find_mixers(model).values()
    assert len(mixers) == 12 and all(m.act.name == row['activation'] for m in mixers)
    assert all((m.relative_position_bias_table is not None) == (row['pos'] == 'rel') for m in mixers)
    assert any('pos_embed' in n for n in names) == (row['pos'] == 'abs') and ('cls_token' in names) == row['class_token']
    assert model.global_pool == ('token' if row['class_token'] else 'avg')


def test_table_2_and_3_are_complete():
    assert len(TABLE2) == 19 and len(TABLE3) == 15
    with pytest.raises(ValueError, match='deit_s'): paper_model('deit_m')


# What timm's users do

@everywhere
def test_features_head_and_intermediates(make):
    model = built(make)
    x, y = images(model), model(images(model))
    assert_equal(model.forward_head(model.forward_features(x)), y, tol=1e-6)
    features, again = model.forward_intermediates(x), built(make, features_only=True)
    maps = [m.permute(0, 3, 1, 2) if isinstance(model, DynamicConvSwin) else m for m in again(x)]     # timm gives Swin's channels last
    assert len(maps) == len(features[1]) == len(again.feature_info.channels())
    for a, b, channels in zip(maps, features[1], again.feature_info.channels()):
        assert_equal(a, b, tol=1e-6)
        assert a.shape[1] == channels
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.forward_head(model.forward_features(x), pre_logits=True).ndim == 2
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@everywhere
def test_copies_pickles_and_state_dicts(make):
    model = built(make)
    x, y = images(model), model(images(model))
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)): assert_equal(other(x), y, tol=0.)
    other = make().eval()
    other.load_state_dict(model.state_dict())
    assert_equal(other(x), y, tol=0.)


@everywhere
def test_checkpointing_has_the_same_gradients(make):
    plain = built(make).double()
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    for m in plain, thrifty: m(images(m).double()).square().sum().backward()
    for (n, p), q in zip(plain.named_parameters(), thrifty.parameters()):
        assert (p.grad is None) == (q.grad is None), n
        if p.grad is not None: assert_equal(p.grad, q.grad)
    assert plain.get_parameter(next(n for n, _ in plain.named_parameters() if n.endswith('proj.weight') or n == 'stem.0.weight')).grad.any()


@everywhere
def test_optimizer_groups(make):
    model = built(make)
    no_decay = model.no_weight_decay()
    marked = {n for n, _ in model.named_parameters() if n.endswith(('relative_position_bias_table', 'pos_embed', 'cls_token', 'dist_token'))}
    assert marked <= set(no_decay)
    groups = timm.optim.param_groups_weight_decay(model, weight_decay=.1, no_weight_decay_list=no_decay)
    free = {id(p) for g in groups if not g['weight_decay'] for p in g['params']}
    assert all((id(p) in free) == (n in marked or p.ndim < 2 or n.endswith('.bias')) for n, p in model.named_parameters())
    layers = timm.optim.param_groups_layer_decay(model, weight_decay=.1, no_weight_decay_list=no_decay, layer_decay=.5)
    assert sum(len(g['params']) for g in layers) == len(list(model.parameters()))


@everywhere
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16], ids=['half', 'bfloat16'])
def test_half_precision(make, dtype):
    model = built(make)
    x = images(model)
    with torch.no_grad():
        y = model(x)
        assert (copy.deepcopy(model).to(dtype)(x.to(dtype)).float() - y).norm() < .05 * y.norm()
        with torch.autocast('cpu', dtype): assert (model(x).float() - y).norm() < .05 * y.norm()


@everywhere
def test_another_input_size(make):
    model = built(make)
    h, w = size_of(model)
    model.set_input_size((h * 3 // 2, w * 2))
    x = images(model)
    model(x).square().sum().backward()
    assert x.shape[2:] == (h * 3 // 2, w * 2) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@everywhere
def test_images_of_any_size(make):
    fixed = built(make)
    takes_any = hasattr(fixed, 'stages')                            # a ConvNeXt does without being asked
    model = built(make) if takes_any else built(make, dynamic_img_size=True)
    h, w = size_of(fixed)
    model.load_state_dict(fixed.state_dict())
    x, other = images(fixed), torch.randn(1, 3, h * 3 // 2, w * 2)
    assert_equal(model(x), fixed(x), tol=1e-5)
    moved = copy.deepcopy(fixed)
    moved.set_input_size((h * 3 // 2, w * 2))
    assert torch.isfinite(model(other)).all()
    if takes_any or isinstance(model, DynamicConvViT): assert_equal(model(other), moved(other), tol=1e-5)
    assert_equal(model(x), fixed(x), tol=1e-5)                     # nothing of the other size stays


def test_d_conv_networks_anneal():
    "From temperature 30 to 1, with the router and the mixture of its convolutions written out here."
    model, seen = built(ZOO['dconv deit']), []
    convs = [m for m in model.modules() if isinstance(m, DynamicConv2d)]
    for conv in convs: conv.register_forward_hook(lambda conv, x, y: seen.append((conv, x[0], y)))
    with torch.no_grad(): model(images(model))
    assert anneal(model, epoch=10) == len(convs) == 3
    with torch.no_grad(): model(images(model))
    gaps = []
    for t, (conv, x, y) in zip([30, 30, 30, 1, 1, 1], seen, strict=True):
        squeeze, _, score = conv.router
        p = (score(squeeze(x.mean((2, 3))).clamp(min=0)) / t).exp()
        p = p / p.sum(1, keepdim=True)
        each = torch.stack([torch.nn.functional.conv2d(x, w, b, padding=1) for w, b in zip(conv.weight, conv.bias)], 1)
        assert_equal(y, torch.einsum('bm,bmchw->bchw', p, each), tol=1e-6)
        gaps.append((y - each.mean(1)).abs().max())
    assert min(gaps[3:]) > 10 * max(gaps[:3]) > 0                  # 30 mixes nearly evenly, 1 does not


# Out of Python

@everywhere
def test_compiles_in_one_graph(make):
    torch._dynamo.reset()
    model = built(make)
    assert_equal(torch.compile(model, backend='eager', fullgraph=True)(images(model)), model(images(model)), tol=1e-5)


@pick('deit ln_relu rel, no token', 'swin softmax', 'swin depthwise', 'linformer deit', 'dconv swin', 'convnext scaling rel')
def test_exports_with_a_free_batch_size(make):
    model = built(make)
    program = torch.export.export(model, (images(model),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert_equal(program.module()(images(model, 3)), model(images(model, 3)), tol=1e-5)


@pick('deit ln_relu rel, no token', 'swin scaling_relu abs', 'deit depthwise rel')
def test_onnx_runs_with_another_batch_size(make, tmp_path):
    runtime = pytest.importorskip('onnxruntime')
    model = built(make)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(model, (images(model),), dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch')},), verbose=False)
    program.save(tmp_path/'model.onnx')
    session, x = runtime.InferenceSession(tmp_path/'model.onnx'), images(model, 5)
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_equal(torch.from_numpy(out), model(x).detach(), tol=1e-5)


@pytest.mark.parametrize('name, settings', [('deit_tiny_patch16_224', dict(activation='scaling_relu')), ('deit_tiny_patch16_224', dict(activation='ln', pos='rel')), ('deit_tiny_patch16_224', dict(activation='ln_relu')),
                                            ('dconv_deit_tiny_patch16_224', {}), ('ddwconv_deit_tiny_patch16_224', {}), ('ddwconv_deit_tiny_patch16_224', dict(per='image')), ('ddwconv_convnext_atto', {}),
                                            ('k3_deit_tiny_patch16_224', {}), ('topk_deit_tiny_patch16_224', {}), ('pyramid_tiny', {}), ('convnext_atto', dict(activation='ln', selection='all'))], ids=str)
def test_the_legacy_exporter_of_onnx(name, settings, tmp_path):
    "It knows fewer operators than torch has: no `mT`, no `unfold` of unknown sizes, no stable sort; and a batch read off a shape is fixed in its graph."
    runtime = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    body = dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), img_size=64) if 'convnext' in name else PYRAMID if 'pyramid' in name else dict(embed_dim=24, depth=2, num_heads=3, patch_size=8, img_size=32)
    model = create_model(name, **dict(num_classes=5) | body | settings).eval()
    x, other = (torch.randn(b, 3, body['img_size'], body['img_size']) for b in (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model, x, tmp_path/'model.onnx', dynamo=False, input_names=['x'], dynamic_axes=dict(x={0: 'batch'}))
    out, = runtime.InferenceSession(tmp_path/'model.onnx').run(None, {'x': other.numpy()})
    assert_equal(torch.from_numpy(out), model(other).detach(), tol=1e-5)


# Weights

def test_weights_of_the_base_and_of_the_finished_model(tmp_path):
    torch.manual_seed(1)
    base = timm.create_model(DEIT, **VIT | dict(num_classes=7))
    torch.save({'model': base.state_dict()}, tmp_path/'base.pth')
    settings = dict(activation='ln_relu', pos='rel', **{k: v for k, v in VIT.items() if k != 'num_classes'})
    ours = create_model(DEIT, checkpoint=tmp_path/'base.pth', **settings).eval()
    assert ours.num_classes == 7 and torch.equal(ours.blocks[2].attn.qkv.weight, base.blocks[2].attn.qkv.weight) and len(ours.conversion.new) == 9
    torch.save(ours.state_dict(), tmp_path/'ours.pth')
    again = create_model(DEIT, checkpoint=tmp_path/'ours.pth', **settings).eval()
    by_timm = timm.create_model(f'vdc_{DEIT}', checkpoint_path=tmp_path/'ours.pth', num_classes=7, **settings).eval()
    for m in again, by_timm: assert_equal(m(images(m)), ours(images(m)), tol=0.)
    fewer = create_model(DEIT, checkpoint=tmp_path/'base.pth', num_classes=2, **settings)
    assert fewer.head.weight.shape == (2, 24) and torch.equal(fewer.blocks[0].attn.proj.weight, base.blocks[0].attn.proj.weight)
    with pytest.raises(ValueError, match='does not fit'): create_model(DEIT, checkpoint=tmp_path/'ours.pth', **VIT | dict(embed_dim=48))


def test_pretrained_weights_come_from_timm(monkeypatch):
    "As timm would fetch them, without a network: the file that the configuration names is replaced by a local state dict."
    torch.manual_seed(2)
    theirs = timm.create_model(DEIT, depth=2)
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', lambda *a, **k: copy.deepcopy(theirs.state_dict()))
    ours = create_model(f'{DEIT}.fb_in1k', 'scaling', pos='abs', class_token=False, pretrained=True, depth=2)
    assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight) and torch.equal(ours.pos_embed, theirs.pos_embed[:, 1:])
    assert ours.pretrained_cfg['tag'] == 'fb_in1k' and torch.equal(ours.fc_norm.weight, theirs.norm.weight)


def test_a_download_that_fails_says_so(monkeypatch):
    def unreachable(*args, **kwargs): raise OSError('name or service not known')
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', unreachable)
    with pytest.raises(ConnectionError, match='could not be downloaded .name or service not known.*checkpoint=FILE'): create_model(DEIT, pretrained=True, depth=1)


def test_publishing_and_fetching_as_timm_does(tmp_path):
    model = built(ZOO['deit ln_relu rel, no token'])
    timm.models.save_for_hf(model, tmp_path/'model')
    assert_equal(timm.create_model(f'local-dir:{tmp_path/"model"}', pretrained=True).eval()(images(model)), model(images(model)), tol=0.)


# From a ConvNet

def test_static_kernels_are_kept_where_they_can_be():
    torch.manual_seed(0)
    base = timm.create_model('convnext_atto', dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_classes=5, ls_init_value=.5).double().eval()
    base.img_size = 64, 64
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for new in exchange(base, 'dconv'), exchange(base, 'ddwconv'), exchange(base, 'ddwconv', per='image'), convert(base, kernel='depthwise', pos='rel', pos_per='channel'):
        assert_equal(new(x), base(x))
        assert not [w for w in new.conversion.weights if w.fate == 'dropped']
        with pytest.raises(ValueError, match='static kernel'): to_timm(new)
    other = exchange(base, 'dconv', kernel_size=3)
    assert other.stages[0].blocks[0].conv_dw.weight.shape == (4, 8, 8, 3, 3) and len(other.conversion.dropped) == 10


@pytest.mark.parametrize('settings', [{}, dict(output_stride=8), dict(output_stride=16, kernel_sizes=5), dict(kernel_sizes=(3, 5, 7, 9)), dict(stem_type='overlap_tiered', kernel_sizes=3)], ids=str)
def test_static_kernels_are_kept_on_any_map(settings):
    "Not square, dilated, of other sizes, behind other stems; and every grid is that of the map."
    torch.manual_seed(0)
    base = timm.create_model('convnext_atto', dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_classes=5, ls_init_value=.5, **settings).double().eval()
    base.img_size = 64, 96
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    new = convert(base, kernel='depthwise', pos='rel', pos_per='channel')
    assert_equal(new(x), base(x))
    maps = base.forward_intermediates(x, intermediates_only=True)
    assert [stage.blocks[-1].conv_dw.mixer.grid_size for stage in new.stages] == [tuple(m.shape[2:]) for m in maps]


def test_a_convnext_has_no_place_for_an_embedding_or_a_token():
    for wrong, reason in (dict(pos='abs'), "'rel', 'none'"), (dict(class_token=True), 'class token'), (dict(pos='relative'), "'rel'"):
        with pytest.raises(ValueError, match=reason): create_model('convnext_atto', **wrong, **CONVNEXT)
    assert create_model('convnext_atto', **CONVNEXT).conversion.new


def test_settings_that_no_mixer_takes_are_refused():
    for wrong, name in (dict(kernel_size=0), 'kernel_size'), (dict(selection='nearest'), 'nearest'):
        with pytest.raises(ValueError, match=name): create_model(DEIT, **wrong, **VIT)


# Other tools

def test_graphs_are_traced_as_timms():
    from timm.models import create_feature_extractor
    for name in 'deit ln_relu rel, no token', 'swin scaling_relu abs', 'swin depthwise', 'dconv deit', 'linformer swin', 'convnext ln_relu':
        model = built(ZOO[name])
        node = 'stages.3' if 'convnext' in name else 'layers.1' if 'swin' in name else 'blocks.2'
        traced = create_feature_extractor(model, [node])
        found, = traced(images(model)).values()
        assert_equal(found.sum(), model.forward_intermediates(images(model), intermediates_only=True, norm=False)[-1].sum(), tol=1e-3)


@and_beyond
def test_graphs_need_no_list_of_leaves(make):
    "`torch.fx` itself, and torchvision's `create_feature_extractor`, which knows no list of timm's."
    from torchvision.models.feature_extraction import create_feature_extractor
    model = built(make)
    x, y = images(model), model(images(model))
    assert_equal(torch.fx.symbolic_trace(model)(x), y, tol=1e-6)
    node = next(name for name in ('stages.3', 'stages.1', 'layers.1', 'blocks.2') if name in dict(model.named_modules()))
    found, = create_feature_extractor(model, [node])(x).values()
    seen = []
    model.get_submodule(node).register_forward_hook(lambda module, inputs, out: seen.append(out))
    model(x)
    assert_equal(found, seen[0], tol=1e-6)


@pytest.mark.parametrize('settings', [{}, dict(activation='scaling_relu', pos='abs'), dict(kernel='depthwise')], ids=['softmax', 'scaling_relu abs', 'depthwise'])
def test_graphs_of_shifted_windows_are_traced(settings):
    "With a mask, before and after a first forward pass, which keeps the mask."
    from timm.models import create_feature_extractor
    torch.manual_seed(0)
    model = create_model(SWIN_T, **settings, **SWIN | dict(depths=(2, 1))).eval()
    for _ in range(2):
        traced = create_feature_extractor(model, ['layers.1'])
        found, = traced(images(model)).values()
        assert_equal(found, model.forward_intermediates(images(model), intermediates_only=True, norm=False)[-1].permute(0, 2, 3, 1), tol=1e-5)
    assert any(block.attn_mask is not None for block in model.layers[0].blocks)


@pytest.mark.parametrize('name, sizes', [(DEIT, VIT), (SWIN_T, SWIN)], ids=['deit', 'swin'])
def test_other_counters_see_what_they_see_of_timms(name, sizes):
    from fvcore.nn import FlopCountAnalysis
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    theirs = timm.create_model(name, **sizes).eval()
    ours = convert(theirs)
    x = images(theirs)
    def flops(model):
        with torch.no_grad(), FlopCounterMode(display=False) as counter: model(x)
        return counter.get_total_flops()
    def linear(model):
        seen = []
        hooks = [m.register_forward_hook(lambda m, args, out: seen.append(out.numel() * m.in_features)) for m in model.modules() if type(m) is torch.nn.Linear]
        model(x)
        for hook in hooks: hook.remove()
        return len(seen), sum(seen)
    def quantised(model):
        packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        return sum(type(m) is torch.ao.nn.quantized.dynamic.Linear for m in packed.modules())
    def counted(model): return FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none').by_operator()['linear']
    for tool in flops, linear, counted: assert tool(ours) == tool(theirs), tool.__name__
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert quantised(ours) == quantised(theirs) == linear(theirs)[0]


@and_beyond
def test_empty_batches(make):
    model = built(make)
    assert model(images(model)[:0]).shape == (0, 5)
    model.train()(images(model)[:0]).sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@and_beyond
def test_traces_for_any_batch(make):
    model = built(make)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, images(model), check_trace=False)
    assert_equal(traced(images(model, 3)), model(images(model, 3)), tol=1e-5)
