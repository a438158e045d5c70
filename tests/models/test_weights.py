"Weights from files, at any size: everything is kept but the head, and nothing is lost without a word."
import copy
import subprocess
import sys
from functools import partial

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vitdynconv.layers.equivalence import attention
from vitdynconv.models.commands import vdc_convert
from vitdynconv.models.registry import create_model
from vitdynconv.models.surgery import convert, to_timm
from vitdynconv.models.systems import exchange
from vitdynconv.models.weights import convert_file, timm_model
from vitdynconv.tools.testing import assert_equal

DEIT, SWIN_T = 'deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'
VIT = dict(embed_dim=24, depth=2, num_heads=3, patch_size=8)
SWIN = dict(embed_dim=12, depths=(1, 2), num_heads=(2, 3))
CONVNEXT = dict(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1))
SMALL, LARGE = dict(deit=(32, 48), swin=(56, 112), convnext=(64, 64)), dict(deit=(64, 96), swin=(112, 224), convnext=(96, 96))
FINISHED = {
    'deit softmax abs': (DEIT, VIT, {}), 'deit rel': (DEIT, VIT, dict(activation='scaling', pos='rel')),
    'deit ln_relu, pooled': (DEIT, VIT, dict(activation='ln_relu', pos='rel', class_token=False)),
    'deit depthwise': (DEIT, VIT, dict(kernel='depthwise', pos='rel', pos_per='channel')),
    'distilled': ('deit_tiny_distilled_patch16_224', VIT, dict(activation='ln', pos='rel')),
    'swin softmax': (SWIN_T, SWIN, {}), 'swin ln abs': (SWIN_T, SWIN, dict(activation='ln', pos='abs')),
    'swin depthwise': (SWIN_T, SWIN, dict(kernel='depthwise', pos_per='channel')),
    'linformer deit': (f'linformer_{DEIT}', VIT, dict(activation='ln')), 'linformer swin': (f'linformer_{SWIN_T}', SWIN, {}),
    'dconv deit': (f'dconv_{DEIT}', VIT, {}), 'ddwconv swin': (f'ddwconv_{SWIN_T}', SWIN, {}),
    'convnext ln': ('convnext_atto', CONVNEXT, dict(activation='ln', pos='rel', selection='all')), 'ddwconv convnext': ('ddwconv_convnext_atto', CONVNEXT, {}),
}
every_finished = pytest.mark.parametrize('name, body, settings', FINISHED.values(), ids=FINISHED)


def stirred(model):
    "Move all weights, so that none is where it started."
    torch.manual_seed(1)
    for p in model.parameters(): p.data += .1 * torch.randn_like(p)
    return model.eval()


def kind(name): return next(k for k in SMALL if k in name)


def built(name, body, settings, size=SMALL, **kwargs):
    torch.manual_seed(0)
    return create_model(name, img_size=size[kind(name)], **dict(num_classes=7) | body | settings | kwargs)


def images(name, size, channels=3): return torch.randn(2, channels, *size[kind(name)], generator=torch.Generator().manual_seed(3))


def same_windows(model): return dict(window_size=7) if hasattr(model, 'layers') else {}   # as a model that is built for another size


def head_of(model):
    heads = model.get_classifier()
    return {n for n, m in model.named_modules() if any(m is h for h in (heads if isinstance(heads, tuple) else (heads,)))}


def assert_kept(new, moved):
    "All weights of a model that was moved to another size, but its heads'."
    heads = tuple(f'{n}.' for n in head_of(new))
    for n, w in moved.state_dict().items():
        if not n.startswith(heads): assert_equal(new.state_dict()[n], w, tol=1e-6)


@every_finished
def test_a_finished_checkpoint_fits_any_size(name, body, settings, tmp_path):
    old = stirred(built(name, body, settings))
    torch.save({'model': old.state_dict()}, tmp_path/'old.pth')
    same = built(name, body, settings, checkpoint=tmp_path/'old.pth').eval()
    assert_equal(same(images(name, SMALL)), old(images(name, SMALL)), tol=1e-6)
    larger = built(name, body, settings, LARGE, checkpoint=tmp_path/'old.pth', num_classes=3).eval()
    moved = copy.deepcopy(old)
    moved.set_input_size(LARGE[kind(name)], **same_windows(moved))
    assert_kept(larger, moved)
    moved.reset_classifier(3)
    for n in head_of(moved): moved.get_submodule(n).load_state_dict(larger.get_submodule(n).state_dict())
    assert_equal(larger(images(name, LARGE)), moved(images(name, LARGE)), tol=1e-5)


@every_finished
def test_other_channels_and_a_headless_file(name, body, settings, tmp_path):
    old = stirred(built(name, body, settings, num_classes=0))
    torch.save(old.state_dict(), tmp_path/'old.pth')
    grey = built(name, body, settings, checkpoint=tmp_path/'old.pth', in_chans=1, num_classes=2).eval()
    stem = 'stem.0.weight' if 'convnext' in name else 'patch_embed.proj.weight'
    assert_equal(grey.state_dict()[stem][:, 0], old.state_dict()[stem].sum(1), tol=1e-5)
    assert grey(images(name, SMALL, 1)).shape == (2, 2)
    grey.get_submodule(stem.rpartition('.')[0]).weight = nn.Parameter(old.state_dict()[stem])
    assert_kept(grey, old)


@every_finished
def test_the_order_of_weights_in_a_file_does_not_matter(name, body, settings, tmp_path):
    "A safetensors file has an order of its own, so the first kernel in it need not be the one that meets the image."
    old = stirred(built(name, body, settings))
    weights = {n: w.clone() for n, w in old.state_dict().items()}
    save_file(weights, tmp_path/'old.safetensors')
    torch.save(dict(reversed(weights.items())), tmp_path/'backwards.pth')
    for file in 'old.safetensors', 'backwards.pth':
        new = create_model(name, img_size=SMALL[kind(name)], checkpoint=tmp_path/file, **body | settings).eval()
        assert_equal(new(images(name, SMALL)), old(images(name, SMALL)), tol=1e-6)


def test_the_stem_of_a_base_file_is_found_by_its_name(tmp_path):
    base = timm.create_model('convnext_atto', num_classes=7, in_chans=2, **CONVNEXT)
    save_file({n: w.clone() for n, w in base.state_dict().items()}, tmp_path/'base.safetensors')
    assert torch.equal(timm_model('convnext_atto', checkpoint=tmp_path/'base.safetensors', **CONVNEXT).stem[0].weight, base.stem[0].weight)


@pytest.mark.parametrize('channels', [1, 2, 5])
def test_other_channels_than_three_answer_alike_to_equal_ones(channels, tmp_path):
    "A picture whose channels are all equal looks the same to a stem of five channels and to one of fewer."
    old = stirred(built(DEIT, VIT, {}, in_chans=5))
    torch.save(old.state_dict(), tmp_path/'old.pth')
    new = built(DEIT, VIT, {}, checkpoint=tmp_path/'old.pth', in_chans=channels).eval()
    grey = images(DEIT, SMALL, 1)
    assert_equal(new(grey.expand(-1, channels, -1, -1)), old(grey.expand(-1, 5, -1, -1)), tol=1e-5)


@every_finished
def test_a_published_model_is_fetched_at_another_size(name, body, settings, tmp_path):
    old = stirred(built(name, body, settings))
    timm.models.save_for_hf(old, tmp_path/'model')
    again = timm.create_model(f'local-dir:{tmp_path/"model"}', pretrained=True).eval()
    assert_equal(again(images(name, SMALL)), old(images(name, SMALL)), tol=1e-6)
    larger = timm.create_model(f'local-dir:{tmp_path/"model"}', pretrained=True, img_size=LARGE[kind(name)], num_classes=2).eval()
    moved = copy.deepcopy(old)
    moved.set_input_size(LARGE[kind(name)], **same_windows(moved))
    assert_kept(larger, moved)


@pytest.mark.parametrize('name, body', [(DEIT, VIT), ('convnext_atto', CONVNEXT)], ids=['deit', 'convnext'])
def test_neighborhoods_that_the_smaller_map_has_no_room_for(name, body, tmp_path):
    "Their size follows the map: 3 x 3 where the file was made, 5 x 5 and more in the model that reads it."
    settings = dict(activation='ln', pos='rel', selection='neighborhood') | (dict(class_token=False) if name == DEIT else {})
    old = stirred(built(name, body, settings))
    torch.save(old.state_dict(), tmp_path/'old.pth')
    moved = copy.deepcopy(old)
    moved.set_input_size(LARGE[kind(name)])
    assert_kept(built(name, body, settings, LARGE, checkpoint=tmp_path/'old.pth', num_classes=3), moved)


WIDE, TALL, TALLER = dict(deit=(32, 48), swin=(56, 112), convnext=(64, 96)), dict(deit=(48, 32), swin=(112, 56), convnext=(96, 64)), dict(deit=(72, 48), swin=(168, 56), convnext=(160, 96))


@every_finished
def test_a_map_that_is_not_square_turns_with_its_image(name, body, settings, tmp_path):
    "24 places are 4 x 6 or 6 x 4: no shape tells which, so the file does."
    old = stirred(built(name, body, settings, WIDE))
    torch.save(old.state_dict(), tmp_path/'bare.pth')
    torch.save({'model': old.state_dict(), 'epoch': 3}, tmp_path/'training.pth')
    torch.save({'state_dict': nn.DataParallel(old).state_dict()}, tmp_path/'parallel.ckpt')
    torch.save({'state_dict_ema': torch.compile(old).state_dict(), 'state_dict': None}, tmp_path/'compiled.pt')
    timm.models.save_for_hf(old, tmp_path/'model')
    for size in TALL, TALLER:
        moved = copy.deepcopy(old)
        moved.set_input_size(size[kind(name)], **same_windows(moved))
        for file in ('bare.pth', 'training.pth', 'parallel.ckpt', 'compiled.pt') if size is TALL else ('bare.pth',):
            assert_kept(built(name, body, settings, size, checkpoint=tmp_path/file), moved)
        if 'convnext' in name: continue      # takes any image, so that timm publishes none of its size
        assert_kept(timm.create_model(f'local-dir:{tmp_path/"model"}', pretrained=True, img_size=size[kind(name)]), moved)
    again = built(name, body, settings, WIDE, checkpoint=tmp_path/'bare.pth').eval()
    assert_equal(again(images(name, WIDE)), old(images(name, WIDE)), tol=1e-6)


def test_a_file_that_does_not_say_its_grid_is_a_square_or_as_it_fits(tmp_path):
    settings = dict(activation='ln', pos='abs')
    old = stirred(create_model(DEIT, img_size=(48, 48), num_classes=7, **VIT, **settings))
    save_file({n: w.clone() for n, w in old.state_dict().items()}, tmp_path/'square.safetensors')
    moved = copy.deepcopy(old)
    moved.set_input_size((64, 144))                                # 8 x 18, of the proportions of 4 x 9
    assert_kept(create_model(DEIT, img_size=(64, 144), checkpoint=tmp_path/'square.safetensors', **VIT, **settings), moved)
    flat = stirred(create_model(DEIT, img_size=(32, 72), num_classes=7, **VIT, **settings))
    save_file({n: w.clone() for n, w in flat.state_dict().items()}, tmp_path/'flat.safetensors')
    again = create_model(DEIT, img_size=(32, 72), checkpoint=tmp_path/'flat.safetensors', **VIT, **settings)
    for n, w in flat.state_dict().items(): assert torch.equal(again.state_dict()[n], w), n


def test_a_finished_file_in_timms_overlay_is_not_taken_for_the_bases(tmp_path):
    settings = dict(activation='ln_relu', pos='rel')
    old = stirred(built(DEIT, VIT, settings))
    torch.save(old.state_dict(), tmp_path/'old.pth')
    new = timm.create_model(f'vdc_{DEIT}', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'old.pth')), img_size=SMALL['deit'], num_classes=2, **VIT, **settings)
    assert_kept(new, old)


def test_a_file_that_fits_nothing_is_refused_and_says_why(tmp_path):
    old = built(DEIT, VIT, dict(activation='ln', pos='rel'))
    state = old.state_dict()
    torch.save(state, tmp_path/'old.pth')
    torch.save({n: w for n, w in state.items() if 'qkv' not in n}, tmp_path/'part.pth')
    torch.save({'fc.weight': torch.zeros(2, 2)}, tmp_path/'other.pth')
    for file, settings, reason in [('old.pth', dict(activation='ln', pos='abs'), 'lacks pos_embed'), ('old.pth', dict(activation='scaling', pos='rel'), 'blocks.0.attn.act.weight'),
                                   ('part.pth', dict(activation='ln', pos='rel'), 'qkv'), ('other.pth', {}, 'fc.weight')]:
        with pytest.raises(ValueError, match=f'does not fit.*{reason}'): built(DEIT, VIT, settings, checkpoint=tmp_path/file, num_classes=2)
    with pytest.raises(ValueError, match='does not fit.*24'): built(DEIT, VIT | dict(embed_dim=48), dict(activation='ln', pos='rel'), checkpoint=tmp_path/'old.pth')
    with pytest.raises(ValueError, match='does not fit'): convert_file(DEIT, {}, str(tmp_path/'old.pth'), out=str(tmp_path/'new.safetensors'))


@pytest.mark.parametrize('name', [DEIT, f'vdc_{DEIT}', f'vdc_dconv_{DEIT}', f'vdc_{SWIN_T}', 'vdc_convnext_atto', 'vdc_pyramid_tiny'])
def test_the_command_refuses_any_misfit_in_one_line(name, tmp_path, capsys):
    "A name of ours is known without an import of the registry, and no file ends in a traceback."
    vit = timm.create_model('vit_tiny_patch16_224', depth=1).state_dict()
    files = dict(other={'fc.weight': torch.zeros(2, 2)}, part={n: w for n, w in vit.items() if 'mlp' not in n}, scalar=vit | {'head.weight': torch.tensor(1.), 'norm.weight': torch.tensor(1.)},
                 flat=vit | {'patch_embed.proj.weight': vit['patch_embed.proj.weight'][0]}, names=['a', 'b'], nothing={},
                 list={'model': [1, 2]}, none={'state_dict': None}, word={'model': 'deit'}, inner={'model': {}}, tuple=(vit, {}), count=vit | {'epoch': 3})
    for file, state in files.items(): torch.save(state, tmp_path/f'{file}.pth')
    (tmp_path/'empty.pth').write_bytes(b'')
    (tmp_path/'garbage.safetensors').write_bytes(b'no safetensors at all')
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SystemExit) as end: vdc_convert(name, checkpoint=str(path), out=str(tmp_path/'new.safetensors'))
        said = capsys.readouterr().err
        assert end.value.code == 2 and path.name in said and said.count('\n') == 1 and 'unknown model' not in said, said
    assert not (tmp_path/'new.safetensors').exists()


def test_the_command_knows_our_names_in_a_fresh_process(tmp_path):
    words = ['--model', 'vdc_deit_tiny_patch16_224', '--out', tmp_path/'new.safetensors']
    done = subprocess.run([Path(sys.executable).parent/'vdc_convert', *words], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path/'new.safetensors').exists(), done.stderr


@pytest.mark.parametrize('name, body, settings', [(DEIT, VIT, dict(activation='ln_relu', pos='rel')), (f'dconv_{DEIT}', VIT, {}), (SWIN_T, SWIN, dict(kernel='depthwise'))], ids=['deit', 'dconv', 'swin'])
def test_a_file_of_the_base_in_timms_overlay(name, body, settings, tmp_path):
    base = timm.create_model(name.removeprefix('dconv_'), img_size=SMALL[kind(name)], num_classes=7, **body)
    torch.save(base.state_dict(), tmp_path/'base.pth')
    new = timm.create_model(f'vdc_{name}', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'base.pth')), img_size=SMALL[kind(name)], num_classes=7, **body, **settings)
    for n, w in base.state_dict().items():
        if 'mlp' in n or 'head' in n or 'patch_embed' in n: assert torch.equal(new.state_dict()[n], w), n


def test_a_base_file_of_which_weights_are_missing_is_refused_with_any_head(tmp_path):
    base = timm.create_model(DEIT, img_size=32, num_classes=7, **VIT)
    torch.save({n: w for n, w in base.state_dict().items() if 'blocks.1' not in n}, tmp_path/'part.pth')
    torch.save({n: w for n, w in base.state_dict().items() if 'head' not in n}, tmp_path/'headless.pth')
    with pytest.raises(ValueError, match='blocks.1'): timm_model(DEIT, checkpoint=tmp_path/'part.pth', img_size=32, num_classes=2, **VIT)
    new = timm_model(DEIT, checkpoint=tmp_path/'headless.pth', img_size=32, num_classes=2, **VIT)
    assert new.head.out_features == 2 and torch.equal(new.blocks[1].attn.qkv.weight, base.blocks[1].attn.qkv.weight)
    ours = create_model(DEIT, 'ln', pos='rel', checkpoint=tmp_path/'headless.pth', img_size=32, num_classes=2, **VIT)
    assert torch.equal(ours.blocks[1].attn.qkv.weight, base.blocks[1].attn.qkv.weight)


@every_finished
def test_built_on_the_meta_device(name, body, settings):
    old = stirred(built(name, body, settings))
    new = built(name, body, settings, device='meta').eval()
    assert not {n for n, _ in new.named_buffers()} - new.state_dict().keys()     # no buffer that no checkpoint holds
    with torch.no_grad(): assert new(images(name, SMALL).to('meta')).is_meta
    emptied = copy.deepcopy(new).to_empty(device='cpu')
    emptied.load_state_dict(old.state_dict())
    new.load_state_dict(old.state_dict(), assign=True)
    for model in emptied, new: assert_equal(model.eval()(images(name, SMALL)), old(images(name, SMALL)), tol=0.)


# Layers that are more than a matrix

class LoRA(nn.Module):
    "A linear layer with an adapter, as peft wraps one."
    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x): return self.base(x) + self.b(self.a(x))


def weight_norm(attn): torch.nn.utils.parametrizations.weight_norm(attn.qkv)
def old_weight_norm(attn): torch.nn.utils.weight_norm(attn.proj)
def orthogonal(attn): torch.nn.utils.parametrizations.orthogonal(attn.proj)
def lora(attn): attn.qkv, attn.proj = LoRA(attn.qkv), LoRA(attn.proj)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('wrap', [weight_norm, old_weight_norm, orthogonal, lora], ids=lambda f: f.__name__)
@pytest.mark.parametrize('name', [DEIT, SWIN_T])
def test_wrapped_layers_come_along(wrap, name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=SMALL[kind(name)], num_classes=5, **VIT if name == DEIT else SWIN)
    mixers = [m for m in model.modules() if hasattr(m, 'qkv')]
    for attn in mixers: wrap(attn)
    stirred(model)
    new, x = convert(model), images(name, SMALL)
    assert_equal(new(x), model(x), tol=1e-5)
    assert not new.conversion.new and not new.conversion.dropped
    assert_equal(to_timm(new)(x), model(x), tol=1e-5)
    if wrap in (weight_norm, lora):
        with pytest.raises(ValueError, match='attn.*qkv'): convert(model, kernel='depthwise')


def test_quantised_layers_come_along_or_are_refused_by_name():
    torch.manual_seed(0)
    model = timm.create_model(DEIT, img_size=32, num_classes=5, **VIT).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    x = torch.randn(2, 3, 32, 32)
    try: new = convert(quantised)
    except ValueError as error: assert 'qkv' in str(error) or 'copied' in str(error)
    else: assert_equal(new(x), quantised(x), tol=1e-5)


@pytest.mark.parametrize('settings', [{}, dict(activation='ln', pos='rel'), dict(kernel='depthwise', pos='rel')], ids=str)
def test_attention_that_blocks_share_stays_shared(settings):
    torch.manual_seed(0)
    model = timm.create_model(DEIT, img_size=32, num_classes=5, **VIT).eval()
    model.blocks[1].attn = model.blocks[0].attn
    new = convert(model, **settings)
    assert new.blocks[0].attn is new.blocks[1].attn
    x = torch.randn(2, 3, 32, 32)
    if not settings:
        assert_equal(new(x), model(x), tol=1e-5)
        back = to_timm(new)
        assert back.blocks[0].attn is back.blocks[1].attn
        assert_equal(back(x), model(x), tol=1e-5)


def test_weights_that_attention_shares_stay_shared():
    torch.manual_seed(0)
    model = timm.create_model(DEIT, img_size=32, num_classes=5, **VIT).eval()
    model.blocks[1].attn.qkv, model.blocks[1].attn.proj.weight = model.blocks[0].attn.qkv, model.blocks[0].attn.proj.weight
    for settings in {}, dict(kernel='depthwise'):
        new = convert(model, **settings)
        first, second = (getattr(b.attn, 'qk' if settings else 'qkv') for b in new.blocks)
        assert first.weight is second.weight and first.bias is second.bias and new.blocks[0].attn.proj.weight is new.blocks[1].attn.proj.weight


@pytest.mark.parametrize('name', [DEIT, SWIN_T])
def test_dropout_on_weights_of_kernels_is_honoured_or_refused(name):
    model = timm.create_model(name, img_size=SMALL[kind(name)], attn_drop_rate=.5, **VIT if name == DEIT else SWIN)
    assert all(m.attn_drop.p == .5 for m in convert(model).modules() if hasattr(m, 'attn_drop'))
    with pytest.raises(ValueError, match='attn.*attn_drop'): convert(model, kernel='depthwise')
    with pytest.raises(ValueError, match='attn_drop'): create_model(f'dconv_{name}', img_size=SMALL[kind(name)], attn_drop_rate=.5, **VIT if name == DEIT else SWIN)
    dropping = create_model(f'ddwconv_{name}', img_size=SMALL[kind(name)], proj_drop_rate=.5, **VIT if name == DEIT else SWIN)
    assert all(m.proj_drop.p == .5 for m in dropping.modules() if hasattr(m, 'proj_drop'))


# Modules that do more than their class says

def weight_normed_tables(attn): torch.nn.utils.weight_norm(attn, 'relative_position_bias_table')
def hooked(attn): attn.register_forward_hook(lambda module, inputs, y: 2 * y)
def hooked_before(attn): attn.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
def hooked_behind(attn): attn.register_full_backward_hook(lambda module, grads, _: None)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('wrap', [weight_normed_tables, hooked, hooked_before, hooked_behind], ids=lambda f: f.__name__)
def test_hooks_on_a_mixer_are_refused_by_name(wrap):
    model = timm.create_model(SWIN_T, img_size=SMALL['swin'], num_classes=5, **SWIN)
    wrap(model.layers[1].blocks[1].attn)
    for operation in convert, partial(convert, kernel='depthwise'), partial(exchange, system='dconv'):
        with pytest.raises(ValueError, match=r'layers\.1\.blocks\.1\.attn has .*hooks.*remove'): operation(model)
    new = convert(timm.create_model(SWIN_T, img_size=SMALL['swin'], num_classes=5, **SWIN))
    hooked(new.layers[0].blocks[0].attn)
    with pytest.raises(ValueError, match='attn has forward hooks'): to_timm(new)


def test_a_hook_on_rows_that_are_cut_is_refused_and_else_it_comes_along():
    model = timm.create_model(DEIT, img_size=32, num_classes=5, **VIT).eval()
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, y: 2 * y)
    x = torch.randn(2, 3, 32, 32)
    assert_equal(convert(model)(x), model(x), tol=1e-5)
    with pytest.raises(ValueError, match='qkv.*forward hooks.*remove'): convert(model, kernel='depthwise')


@pytest.mark.parametrize('path', ['', 'blocks.1', 'blocks.0.attn.qkv'])
def test_a_wrapped_forward_is_refused_by_name(path):
    "A copy would go on computing with the weights of the model it was copied from."
    model = timm.create_model(DEIT, img_size=32, num_classes=5, **VIT)
    module = model.get_submodule(path)
    module.forward = module.forward
    with pytest.raises(ValueError, match=f'{path or "VisionTransformer"} has a forward of its own.*wrapper'): convert(model)


class ScaledConv(nn.Conv2d):
    "A convolution with a factor, as quantised and adapted ones have."
    def forward(self, x): return 2 * super().forward(x)


def scaled_conv(block):
    c = block.conv_dw.in_channels
    block.conv_dw = ScaledConv(c, c, 7, padding=3, groups=c)


def adapted_conv(block): block.conv_dw = nn.Sequential(block.conv_dw, nn.BatchNorm2d(block.conv_dw.out_channels))
def spectral_conv(block): torch.nn.utils.spectral_norm(block.conv_dw)
def weight_normed_conv(block): torch.nn.utils.parametrizations.weight_norm(block.conv_dw)


OPERATIONS = {'attention': partial(convert, selection='all'), 'depthwise': partial(convert, kernel='depthwise', pos='rel', pos_per='channel'),
              'dconv': partial(exchange, system='dconv'), 'ddwconv': partial(exchange, system='ddwconv'), 'linformer': partial(exchange, system='linformer')}


@pytest.mark.parametrize('wrap', [scaled_conv, adapted_conv, spectral_conv, weight_normed_conv], ids=lambda f: f.__name__)
@pytest.mark.parametrize('operation', OPERATIONS.values(), ids=OPERATIONS)
def test_a_convolution_that_is_more_than_a_kernel_is_refused_by_name(operation, wrap):
    model = timm.create_model('convnext_atto', num_classes=5, **CONVNEXT)
    wrap(model.stages[2].blocks[1])
    with pytest.raises(ValueError, match=r'stages\.2\.blocks\.1\.conv_dw.*(plain nn.Conv2d|hooks)'): operation(model)


# Systems in blocks that are shared

@pytest.mark.parametrize('system', ['linformer', 'dconv', 'ddwconv'])
def test_shared_blocks_and_mixers_of_swin_stay_shared_without_windows(system):
    body = SWIN | dict(depths=(1, 4))
    plain = exchange(timm.create_model(SWIN_T, img_size=SMALL['swin'], num_classes=5, **body), system)
    block, mixer = (timm.create_model(SWIN_T, img_size=SMALL['swin'], num_classes=5, **body) for _ in range(2))
    block.layers[1].blocks[3] = block.layers[1].blocks[1]
    mixer.layers[1].blocks[2].attn = mixer.layers[1].blocks[1].attn
    shared, mixed = (exchange(m, system).layers[1].blocks for m in (block, mixer))
    assert shared[3] is shared[1] and shared[2] is not shared[1]
    assert mixed[2].attn is mixed[1].attn and mixed[2] is not mixed[1]
    for blocks in shared, mixed: assert [type(b) for b in blocks] == [type(b) for b in plain.layers[1].blocks]
