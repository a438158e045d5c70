"The learner as fastai users have it, and each word of a recipe in effect."
import math
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.basics import Callback, CancelStepException, load_learner
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.hook import ActivationStats
from fastai.callback.progress import ProgressCallback, ShowGraphCallback
from fastai.interpret import ClassificationInterpretation, Interpretation
import fastai.vision.learner  # teaches Interpretation to draw images
from fastai.metrics import F1Score
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay

from vitdynconv.tools.testing import assert_equal
from vitdynconv.data import digits_dls
from vitdynconv.layers.dconv import DynamicConv2d
from vitdynconv.train.callbacks import MeanLoss, Mixing, accuracy, sum_over_processes
from vitdynconv.train.learner import create_learner, parameter_depths, parameter_groups
from vitdynconv.train.logbook import StepLog, peak_memory_gb
from vitdynconv.models.registry import OWN, PRESETS, create_model
from vitdynconv.models.surgery import convert
from vitdynconv.models.systems import SYSTEMS
from vitdynconv.train.recipes import RECIPES

matplotlib.use('agg')


def small_vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2, **options)


def digits_learner(cbs=(), metrics=None, path=None, model=None, **changes):
    settings = dict(epochs=1, warmup_epochs=0.25, batch_size=64, lr=4e-3, lr_batch_size=64, label_smoothing=0.) | changes
    recipe = RECIPES['digits'].replace(**settings)
    dls = digits_dls(batch_size=64 // recipe.grad_accum, size=8, shift=0)
    return create_learner(model or small_vit(), dls, recipe, cbs=cbs, metrics=metrics, path=path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    learn = digits_learner(path=tmp_path_factory.mktemp('learner'), epochs=2)
    learn.fit()
    return learn


def test_history_has_a_row_an_epoch(trained):
    assert [row['epoch'] for row in trained.history] == [1, 2]
    assert set(trained.history[0]) >= {'train_loss', 'valid_loss', 'accuracy', 'lr', 'seconds'}
    assert trained.history[1]['valid_loss'] < trained.history[0]['valid_loss'] < math.log(10) + 0.1


def test_validation_counts_what_the_predictions_say(trained):
    logits, labels = trained.get_preds(act=lambda x: x)
    loss, accuracy = trained.validate()
    assert len(labels) == 360
    assert_equal(torch.tensor(loss), F.cross_entropy(logits, labels), 1e-5)
    assert_equal(torch.tensor(accuracy), (logits.argmax(1) == labels).float().mean(), 1e-6)
    assert len(trained.history) == 2, 'validate is not an epoch'


def test_a_process_without_held_out_images_joins_the_sum(monkeypatch):
    "Every process brings the same numbers to the exchange, or the others wait for ever."
    full, none = ([MeanLoss(), accuracy()] for _ in range(2))
    for mean in full + none: mean.reset()
    for mean in full: mean.add(torch.tensor([1., 0., 1., 0.5]))
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: True)
    monkeypatch.setattr('torch.distributed.all_reduce', lambda sums: sums.add_(torch.tensor([2.5, 4., 2.5, 4.])))
    sum_over_processes(none, 'cpu')                                  # the other process has the four images
    assert [(mean.value, mean.count) for mean in none] == [(0.625, 4)] * 2
    monkeypatch.setattr('torch.distributed.all_reduce', lambda sums: sums.add_(torch.zeros(4)))
    sum_over_processes(full, 'cpu')
    assert [(mean.value, mean.count) for mean in full] == [(0.625, 4)] * 2
    for mean in none: mean.reset()
    sum_over_processes(none, 'cpu')
    assert [mean.value for mean in none] == [None, None]


def test_predictions_are_probabilities_and_classes(trained):
    probabilities, _, classes = trained.get_preds(with_decoded=True)
    assert_equal(probabilities.sum(1), torch.ones(360), 1e-5)
    assert_equal(classes, probabilities.argmax(1))


def test_training_loss_is_the_mean_of_the_epoch():
    class Losses(Callback):
        run_valid = False
        def before_fit(self): self.seen = []
        def after_loss(self): self.seen.append(float(self.learn.loss))
    learn = digits_learner(Losses())
    learn.fit()
    assert learn.history[0]['train_loss'] == pytest.approx(sum(learn.losses.seen) / len(learn.losses.seen), rel=1e-6)
    smooth, expected = 0., []
    for i, loss in enumerate(learn.losses.seen, 1):
        smooth = 0.98 * smooth + 0.02 * loss
        expected.append(smooth / (1 - 0.98 ** i))
    assert learn.recorder.losses == pytest.approx(expected, rel=1e-5)


def test_lr_find_leaves_everything_as_it_was(trained):
    before, rows = [p.clone() for p in trained.model.parameters()], list(trained.history)
    suggestion = trained.lr_find(show_plot=True)
    assert 1e-7 < suggestion.valley < 10
    assert len(set(trained.recorder.lrs)) > 50, 'the recipe must not set the rate while another scheduler does'
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters()))
    assert trained.history == rows


def test_plots_results_and_interpretation(trained):
    trained.fit(1)
    trained.recorder.plot_loss()
    trained.show_results()
    worst = Interpretation.from_learner(trained).top_losses(5)
    logits, labels = trained.get_preds(act=lambda x: x)
    assert_equal(worst[0], F.cross_entropy(logits, labels, reduction='none').topk(5).values, 1e-5)
    matrix = ClassificationInterpretation.from_learner(trained).confusion_matrix()
    assert matrix.sum() == 360 and matrix.trace() == round(float((logits.argmax(1) == labels).sum()))
    Interpretation.from_learner(trained).plot_top_losses(4)


def test_summary_counts_the_parameters(trained):
    in_layers = sum(p.numel() for name, p in trained.model.named_parameters() if name not in ('cls_token', 'pos_embed'))
    assert f'Total params: {in_layers:,}' in str(trained.summary())


def test_export_and_load(trained):
    trained.export('exported.pkl')
    again = load_learner(trained.path/'exported.pkl')
    x, _ = trained.dls.valid.one_batch()
    assert_equal(again.model(x), trained.model.eval()(x))
    assert trained.fit(1) is None, 'an exported learner trains on'


def test_your_own_callbacks_metrics_and_schedules():
    class Count(Callback):
        steps = 0
        def after_step(self): self.steps += 1
    learn = digits_learner([Count()], metrics=[F1Score(average='macro')])
    learn.fit_one_cycle(1, 1e-2)
    assert learn.count.steps == len(learn.dls.train)
    assert 'f1_score' in learn.history[0]
    assert max(learn.recorder.lrs) == pytest.approx(1e-2, rel=1e-2), 'fit_one_cycle goes before the recipe'


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    runs = [digits_learner(seed=seed, label_smoothing=0.1, mixup=0.8) for seed in (3, 3, 4)]
    for run in runs: run.fit()
    weights = [torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_misspelt_event_is_an_error(trained):
    with pytest.raises(ValueError, match="'before_bach' is no event: choose from after_create, before_fit, .*after_fit"): trained('before_bach')
    with pytest.raises(ValueError, match="'__init__' is no event"): trained(['after_create', '__init__'])


def test_the_log_tells_zero_from_unknown(monkeypatch, capsys):
    log = StepLog()
    log.learn = SimpleNamespace(epoch=0, iter=1, n_iter=2, smooth_loss=1., recorder=SimpleNamespace(lrs=[1e-3]))
    for norm, words in ((0., 'gradient norm 0.00,'), (None, 'gradient norm nan,')):
        monkeypatch.setattr(log, 'measures', lambda: dict(images_per_second=1., data_wait=0., gradient_norm=norm, peak_memory=1.))
        log.write()
        assert words in capsys.readouterr().out
    monkeypatch.setattr(log, 'write', lambda: steps.append(log.learn.iter + 1))
    log.learn.logger, log.learn.n_iter, log.every, steps = print, 40, 20, []
    for log.learn.iter in range(40): log.after_batch()
    assert steps == [20], 'the last step has the line of its epoch'
    assert 0.01 < peak_memory_gb(torch.device('cpu')) < 1000
    monkeypatch.setitem(sys.modules, 'resource', None)  # as on Windows
    assert math.isnan(peak_memory_gb(torch.device('cpu')))


def by_decay(groups, model):
    "Names of the parameters without and with decay."
    names = {id(p): name for name, p in model.named_parameters()}
    found = {False: set(), True: set()}
    for group in groups: found[group['decays']] |= {names[id(p)] for p in group['params']}
    return found[False], found[True]


@pytest.mark.parametrize('layer_decay', [None, 0.7])
@pytest.mark.parametrize('name', ['deit_small_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_decay_groups_of_the_papers_models(name, layer_decay):
    model = create_model(name, activation='ln_relu', pos='rel', num_classes=4)
    groups = parameter_groups(model, layer_decay=layer_decay)
    resting, decaying = by_decay(groups, model)
    assert all(n.endswith('.weight') and 'norm' not in n and '.act.' not in n for n in decaying)
    assert any('relative_position_bias_table' in n for n in resting) and any('.act.weight' in n for n in resting)
    assert resting | decaying == {n for n, _ in model.named_parameters()} and not resting & decaying
    assert all(group['weight_decay'] == (0.05 if group['decays'] else 0.) for group in groups)


@pytest.mark.parametrize('layer_decay', [None, 0.7])
def test_biases_of_dynamic_convolutions_do_not_decay(layer_decay):
    "They are a matrix, one row for each kernel of the bank."
    net = torch.nn.Sequential(DynamicConv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10))
    for model in (net, DynamicConv2d(1, 8, 3)):
        resting, decaying = by_decay(parameter_groups(model, layer_decay=layer_decay), model)
        assert all(name.rpartition('.')[2] == 'bias' for name in resting) and all(name.rpartition('.')[2] == 'weight' for name in decaying)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'swin_tiny_patch4_window7_224', 'convnext_atto'])
@pytest.mark.parametrize('decay', [0.5, 0.9])
def test_layers_and_shares_are_timms(name, decay):
    "What timm divides by layer of its own accord, but for norms right before the head."
    model = timm.create_model(name, num_classes=3)
    theirs, ours = [{id(p): group['lr_scale'] for group in groups for p in group['params']}
                    for groups in (param_groups_layer_decay(model, layer_decay=decay), parameter_groups(model, layer_decay=decay))]
    special = {id(p) for n, p in model.named_parameters() if n.startswith(('head.norm', 'fc_norm'))}
    assert {key: value for key, value in ours.items() if key not in special} == pytest.approx({key: value for key, value in theirs.items() if key not in special})


BODIES = [lambda: small_vit(), lambda: small_vit(class_token=False, global_pool='avg'),
          lambda: timm.create_model('swin_tiny_patch4_window7_224', img_size=32, patch_size=2, in_chans=1, num_classes=10, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4),
          lambda: timm.create_model('convnext_atto', in_chans=1, num_classes=10, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
          lambda: create_model('vit_tiny_patch16_224', activation='ln_relu', img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2, pos='rel'),
          lambda: create_model('pyramid_tiny', 'ln', pos='rel', embed_dims=(16, 32), depths=(1, 2), num_heads=(2, 4), strides=(1, 2), img_size=8, patch_size=2, in_chans=1, num_classes=10),
          lambda: convert(timm.create_model('swin_tiny_patch4_window7_224', img_size=16, patch_size=2, in_chans=1, num_classes=10, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4), kernel='depthwise', pos='abs'),
          lambda: create_model('linformer_deit_tiny_patch16_224', img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2),
          lambda: create_model('dconv_convnext_atto', in_chans=1, num_classes=10, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))]


@pytest.mark.parametrize('body', range(len(BODIES)))
@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_freeze_leaves_exactly_the_head(body, layer_decay):
    model = BODIES[body]()
    learn = digits_learner(model=model, layer_decay=layer_decay)
    head = {id(p) for p in model.get_classifier().parameters()}
    learn.freeze()
    assert {id(p) for p in model.parameters() if p.requires_grad} == head
    learn.unfreeze()
    assert all(p.requires_grad for p in model.parameters())
    learn.freeze_to(-2)
    open_names = {n for n, p in model.named_parameters() if p.requires_grad}
    depths = parameter_depths(model)
    assert open_names == {n for n in depths if depths[n] >= max(depths.values()) - 1} and len(open_names) > 2
    learn.freeze_to(1)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {n for n in depths if depths[n] == 0} != set()


KINDS = [name for name in OWN if 'small' not in name]
KINDS += [f'{kind}_{body}' for kind in (*SYSTEMS, *PRESETS) for body in ('deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'convnext_atto')
          if timm.is_model(f'vdc_{kind}_{body}')]


def tiny(name, **settings):
    "The smallest network of a kind, for digits of 8 x 8."
    torch.manual_seed(0)
    if 'pyramid' in name: sizes = dict(embed_dims=(8, 16), depths=(1, 2), num_heads=(2, 4), strides=(1, 2), patch_size=2)
    elif 'swin' in name: sizes = dict(embed_dim=8, depths=(2, 1), num_heads=(1, 2), patch_size=2)
    elif 'convnext' in name: sizes = dict(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), patch_size=1)
    else: sizes = dict(embed_dim=16, depth=3, num_heads=2, patch_size=2)
    return create_model(name, img_size=8, in_chans=1, num_classes=10, **sizes | settings)


def depths_by_name(model):
    "Stem 0, then block by block, what leads into a stage with its first block and the last norm with the last one, then the head: read off the names."
    names = [name for name, _ in model.named_parameters()]
    block = re.compile(r'(?:blocks|layers\.\d+\.blocks|stages\.\d+\.blocks|stages\.\d+)\.\d+(?=\.)')
    blocks = sorted({found[0] for name in names if (found := block.match(name))}, key=lambda words: [int(n) for n in re.findall(r'\d+', words)])
    depths = {}
    for name in names:
        stage = name.partition('.downsample.')[0] + '.'
        if found := block.match(name): depths[name] = 1 + blocks.index(found[0])
        elif '.downsample.' in name: depths[name] = 1 + next(i for i, words in enumerate(blocks) if words.startswith(stage))
        elif name.startswith(('norm.', 'fc_norm.', 'head.norm.')): depths[name] = len(blocks)
        else: depths[name] = len(blocks) + 1 if name.startswith('head') else 0
    assert len(blocks) >= 3 and set(depths.values()) == set(range(len(blocks) + 2))
    return depths


@pytest.mark.parametrize('settings', [dict(), dict(activation='ln_relu', pos='rel')], ids=['as it is', 'ln_relu rel'])
@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_has_groups_by_depth_and_decay(kind, settings):
    "What decays, what a slice gives to whom, and what is frozen: from the names of the parameters alone."
    if settings and kind.startswith(tuple(SYSTEMS)): pytest.skip('a system has no activation and position to choose')
    if 'depthwise' in kind: settings = settings and dict(pos='rel')
    model = tiny(kind, **settings)
    learn, depths = digits_learner(model=model, layer_decay=0.5, weight_decay=0.125), depths_by_name(model)
    learn.create_opt()
    names, last = {id(p): n for n, p in model.named_parameters()}, max(depths.values())
    found = {names[id(p)]: (group['depth'], group['weight_decay']) for group in learn.opt.opt.param_groups for p in group['params']}
    free = re.compile(r'bias$|relative_position_bias_table$|(^|\.)(pos_embed|cls_token)$|norm\d?\.weight$|\.act\.weight$|gamma$|(stem\.1|downsample\.0)\.weight$')
    assert found == {n: (depths[n], 0. if free.search(n) else 0.125) for n in depths}
    share = {n: 0.5 ** (last - depth) for n, depth in depths.items()}
    for rates, expected in [(slice(1e-5, 1e-2), {n: 1e-5 * 1000 ** (depth / last) for n, depth in depths.items()}),
                            (slice(1e-2), {n: 1e-2 if depth == last else 1e-3 for n, depth in depths.items()})]:
        learn.opt.set_hyper('lr', rates)
        assert Rates.of(learn) == pytest.approx({n: expected[n] * share[n] for n in depths})
    for count in range(-last, 0):
        learn.freeze_to(count)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in depths if depths[n] > last + count}
    learn.freeze()
    head = 'head.fc' if 'head.fc.weight' in depths else 'head'
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f'{head}.weight', f'{head}.bias'}


@pytest.mark.parametrize('kind', ['pyramid_tiny', 'vit_tiny_mixers_wide', 'neighborhood_convnext_atto', 'k3_deit_tiny_patch16_224'])
def test_newer_kinds_are_fine_tuned_head_first(kind):
    model, phases = tiny(kind), []
    learn, depths = digits_learner(model=model), depths_by_name(model)
    last, head = max(depths.values()), {n for n in depths if depths[n] == max(depths.values())}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    class Phases(Rates):
        def after_fit(self): phases.append((self.open, self.seen, {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}))
    learn.fine_tune(1, 1e-2, freeze_epochs=1, lr_mult=100, cbs=Phases())
    (frozen, _, moved), (opened, seen, later) = phases
    assert frozen == moved == head and opened == set(depths) and later > head and {depths[n] for n in later} == set(depths.values())
    highest = {n: max(step[n] for step in seen) for n in depths}
    assert highest == pytest.approx({n: 5e-5 * 100 ** (depth / last) for n, depth in depths.items()}, rel=0.02)


def test_only_the_head_moves_while_the_rest_is_frozen():
    learn = digits_learner(ema=True, ema_decay=0.9, weight_decay=0.5, mixup=0.8)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    learn.freeze()
    learn.fit(1)
    moved = {n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {'head.weight', 'head.bias'}


class Rates(Callback):
    "Rates of all torch's groups, by name of the parameters, after each step; and what trains."
    order = 95
    def before_fit(self): self.seen, self.open = [], set()
    @staticmethod
    def of(learn):
        names = {id(p): n for n, p in learn.model.named_parameters()}
        return {names[id(p)]: group['lr'] for group in learn.opt.opt.param_groups for p in group['params']}
    def after_step(self):
        self.seen.append(Rates.of(self))
        self.open |= {n for n, p in self.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_slices_spread_over_depths(layer_decay):
    "`slice(a, b)`: from a at the first depth to b at the head, by equal factors. `slice(b)`: b at the head, a tenth elsewhere."
    learn = digits_learner(layer_decay=layer_decay)
    depths = parameter_depths(learn.model)
    last = max(depths.values())
    assert last == 3
    share = {n: (layer_decay or 1.) ** (last - depth) for n, depth in depths.items()}
    learn.create_opt()
    def now(): return Rates.of(learn)
    learn.opt.set_hyper('lr', slice(1e-2))
    assert now() == pytest.approx({n: (1e-2 if depths[n] == last else 1e-3) * share[n] for n in depths})
    learn.opt.set_hyper('lr', slice(1e-5, 1e-2))
    assert now() == pytest.approx({n: 1e-5 * 1000 ** (depths[n] / last) * share[n] for n in depths})
    rates = Rates()
    learn.fit_one_cycle(1, slice(1e-5, 1e-2), cbs=rates)
    highest = {n: max(step[n] for step in rates.seen) for n in depths}
    expected = {n: 1e-5 * 1000 ** (depths[n] / last) * share[n] for n in depths}
    assert highest == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_the_recipes_own_schedule_follows_a_slice(layer_decay):
    learn = digits_learner(layer_decay=layer_decay, warmup_epochs=0.5)
    rates = Rates()
    learn.fit(1, slice(1e-5, 1e-2), cbs=rates)
    depths = parameter_depths(learn.model)
    top = max(range(len(rates.seen)), key=lambda i: rates.seen[i]['head.weight'])
    share = {n: (layer_decay or 1.) ** (3 - depths[n]) for n in depths}
    assert rates.seen[top] == pytest.approx({n: 1e-5 * 1000 ** (depths[n] / 3) * share[n] for n in depths}, rel=0.02)


def test_fine_tune_is_frozen_first_and_discriminative_then():
    learn, phases = digits_learner(), []
    class Phases(Rates):
        def after_fit(self): phases.append((self.open, self.seen))
    learn.fine_tune(1, 1e-2, freeze_epochs=1, lr_mult=100, cbs=Phases())
    (frozen, _), (opened, seen) = phases
    assert frozen == {'head.weight', 'head.bias'} and opened == {n for n, _ in learn.model.named_parameters()}
    highest = {n: max(step[n] for step in seen) for n in ('patch_embed.proj.weight', 'head.weight', 'head.bias')}
    assert highest == pytest.approx({'patch_embed.proj.weight': 5e-5, 'head.weight': 5e-3, 'head.bias': 5e-3}, rel=0.02)
    assert 0 < learn.history[-1]['accuracy'] == learn.validate()[1]


def test_hyperparameters_read_are_those_that_were_set():
    "With `layer_decay`, too: a scheduler reads the rates, scales them and writes them back."
    learn = digits_learner(layer_decay=0.5)
    learn.create_opt()
    learn.opt.set_hyper('lr', 0.1)
    for _ in range(3): learn.opt.set_hyper('lr', [hyper['lr'] for hyper in learn.opt.hypers])
    assert [hyper['lr'] for hyper in learn.opt.hypers] == pytest.approx([0.1] * 4)
    assert {group['lr'] for group in learn.opt.opt.param_groups} == {0.1, 0.05, 0.025, 0.0125}
    with pytest.raises(ValueError, match='2 values for a model of 4 depths'): learn.opt.set_hyper('lr', [0.1, 0.2])


def test_weight_decay_of_a_fit_reaches_what_decays():
    learn = digits_learner()
    learn.fit(1, wd=0.25)
    for group in learn.opt.opt.param_groups: assert group['weight_decay'] == (0.25 if group['decays'] else 0.)


def test_a_new_optimizer_of_a_frozen_model_can_be_unfrozen():
    learn = digits_learner()
    learn.freeze()
    learn.fit(1, reset_opt=True)
    assert {n for n, p in learn.model.named_parameters() if p.requires_grad} == {'head.weight', 'head.bias'}
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    assert sum(len(group['params']) for group in learn.opt.opt.param_groups) == len(list(learn.model.parameters()))


@pytest.mark.parametrize('name, settings', [('linformer_deit_tiny_patch16_224', {}), ('topk_deit_tiny_patch16_224', {}), ('deit_tiny_patch16_224', dict(kernel='depthwise', selection='topk')), ('deit_tiny_patch16_224', dict(kernel='depthwise', selection='all')),
                                            ('dconv_deit_tiny_patch16_224', {}), ('ddwconv_deit_tiny_patch16_224', {})], ids=str)
def test_tools_of_fastai_that_look_at_every_layer(name, settings):
    "A selection gives keys, values and a mask, of which some may be None; the layer in it that is looked at gives a tensor."
    model = create_model(name, img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=16, depth=1, num_heads=2, **settings)
    stats = ActivationStats(with_hist=False)
    learn = digits_learner(stats, model=model)
    assert 'Total params' in learn.summary()
    learn.fit(1)
    assert len(stats.stats) == len(learn.dls.train) and all(len(layers) == len(stats.modules) for layers in stats.stats)


def test_what_was_fixed_by_hand_stays_fixed():
    model = small_vit()
    model.pos_embed.requires_grad_(False)
    learn = digits_learner(model=model)
    learn.freeze()
    learn.unfreeze()
    assert not model.pos_embed.requires_grad


def test_a_model_without_layers_is_divided_into_its_children():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    learn = digits_learner(model=model)
    learn.fine_tune(1, 1e-2)
    learn.freeze()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {'3.weight', '3.bias'}
    alone = digits_learner(model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    alone.freeze()
    assert all(p.requires_grad for p in alone.model.parameters()), 'a model of one depth is its own head'


def test_decay_pulls_matrices_and_nothing_else():
    "Without a gradient, AdamW's step is the decay alone."
    learn = digits_learner(weight_decay=0.5, lr=0.1)
    learn.create_opt()
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    for name, p in learn.model.named_parameters():
        matrix = p.ndim > 1 and name not in ('cls_token', 'pos_embed')
        assert_equal(p.detach(), before[name] * (1 - 0.1 * 0.5) if matrix else before[name], 1e-7)


class Events(Callback):
    "Listens to everything."
    order = 1
    def before_fit(self): self.heard = []
    def __call__(self, event_name):
        if hasattr(self, 'heard'): self.heard.append(event_name)
        return super().__call__(event_name)
for _event in ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch', 'after_epoch'):
    setattr(Events, _event, lambda self: None)


def test_every_event_reaches_a_callback_in_fastais_order():
    learn = digits_learner(Events())
    learn.fit()
    step = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch']
    steps, shown = len(learn.dls.train), ['before_batch', 'after_pred', 'after_loss', 'after_batch']
    assert learn.events.heard == step * steps + shown * len(learn.dls.valid) + ['after_epoch', 'after_fit']


def test_a_callback_may_come_and_go_in_the_middle_of_an_epoch():
    class Guest(Callback):
        steps = 0
        def after_step(self): self.steps += 1
    class Host(Callback):
        guest = Guest()
        def before_batch(self):
            if self.training and self.iter == 3: self.learn.add_cb(self.guest)
            if self.training and self.iter == 8: self.learn.remove_cb(self.guest)
    learn = digits_learner(Host(), label_smoothing=0.1)
    learn.fit()
    assert Host.guest.steps == 5 and Host.guest not in learn.cbs


def test_a_callback_that_switches_itself_off_is_on_again_in_the_next_fit():
    class Once(Callback):
        seen = 0
        def after_step(self):
            self.learn.once.seen += 1
            self.run = False
    learn = digits_learner(Once())
    for _ in range(2): learn.fit(1)
    assert learn.once.seen == 2


def test_progress_of_fastai_and_smooth_loss_at_any_time():
    class Look(Callback):
        order, run_valid = 70, False
        def before_fit(self): self.smooth = []
        def after_batch(self): self.smooth.append(self.smooth_loss.item())
    learn = digits_learner([Look(), ProgressCallback()])
    learn.fit()
    assert learn.look.smooth == pytest.approx(learn.recorder.losses, rel=1e-6) and len(learn.look.smooth) == len(learn.dls.train)


def test_layer_decay_survives_every_scheduler():
    learn = digits_learner(layer_decay=0.5)
    learn.fit()
    scales = [group['lr_scale'] for group in learn.opt.opt.param_groups]
    rates = [group['lr'] for group in learn.opt.opt.param_groups]
    assert len(set(scales)) == 4                       # stem, two blocks, head
    assert [rate / scale for rate, scale in zip(rates, scales)] == pytest.approx([learn.recorder.lrs[-1]] * len(rates))
    learn.lr_find(show_plot=False)
    rates = [group['lr'] for group in learn.opt.opt.param_groups]
    assert max(rates) / min(rates) == pytest.approx(max(scales) / min(scales))


def test_a_skipped_step_does_not_move_the_average():
    class Overflow(Callback):
        "What fp16 does when gradients overflow."
        order = 11
        def before_fit(self): self.norms = []
        def before_step(self):
            if self.iter % 2: raise CancelStepException()
        def after_step(self): self.norms.append(self.learn.weight_average.average.module.head.bias.clone())
    class Late(Overflow): order = 99
    learn = digits_learner(Late(), ema=True, ema_decay=0.5)
    learn.fit()
    steps = learn.late.norms
    assert all(torch.equal(a, b) for a, b in zip(steps[::2], steps[1::2]))
    assert not any(torch.equal(a, b) for a, b in zip(steps[1::2], steps[2::2]))


def test_clipping_bounds_the_gradient():
    class Norms(Callback):
        order = 50
        def before_fit(self): self.after = []
        def before_step(self): self.after.append(float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm()))
    learn = digits_learner(Norms(), clip_grad=0.3)
    learn.fit()
    assert max(learn.norms.after) <= 0.3 + 1e-5
    assert float(learn.gradient_norm) > 0.3, 'the log shows the norm before clipping'


def test_mixing_stops_for_the_tail_and_for_validation():
    class Rows(Callback):
        order = 20
        def before_fit(self): self.mixed = {}
        def before_batch(self):
            key = self.epoch, self.training
            y = self.yb[0]
            self.mixed[key] = self.mixed.get(key, False) or (y.ndim == 2 and bool(((y > 0.2).sum(1) > 1).any()))
    learn = digits_learner(Rows(), epochs=2, mixup=0.8, cutmix=1.0, mixup_off_epoch=1)
    learn.fit()
    assert learn.rows.mixed == {(0, True): True, (0, False): False, (1, True): False, (1, False): False}


def test_amp_on_a_cpu_says_that_it_does_nothing(capsys):
    digits_learner(amp='bf16')
    assert "amp='bf16' changes nothing on a cpu" in capsys.readouterr().out


def test_compile_and_channels_last_change_no_name():
    plain, learn = small_vit(), digits_learner(compile=True, channels_last=True)
    assert list(learn.model.state_dict()) == list(plain.state_dict())
    assert learn.model._compiled_call_impl is not None
    assert any(isinstance(cb, ChannelsLast) for cb in learn.cbs)


def test_averaged_weights_are_validated_beside_the_others():
    learn = digits_learner(ema=True, ema_decay=0.9)
    learn.fit()
    x, y = learn.dls.valid.dataset.images, learn.dls.valid.dataset.labels
    with torch.no_grad(): logits = learn.weight_average.average.module(x)
    assert learn.history[0]['ema_accuracy'] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert not hasattr(learn, 'ema')


class Routed(torch.nn.Module):
    "A D-Conv whose router cools down by itself, and a norm with running statistics."
    num_classes = 10
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = DynamicConv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 10)
    def forward(self, x): return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Cool(Callback):
    order, run_valid = 1, False
    def before_batch(self): self.model.conv.anneal(self.epoch + self.iter / self.n_iter, epochs=1)


@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_averaged_weights_copy_buffers(layer_decay):
    "A temperature is a schedule: its average lags behind, and routes as no network ever did."
    learn = digits_learner(Cool(), model=Routed(), ema=True, ema_decay=0.99, layer_decay=layer_decay)
    learn.fit(1)
    average = learn.weight_average.average.module
    assert learn.model.conv.temperature < 3 and average.conv.temperature == learn.model.conv.temperature
    for name, buffer in learn.model.named_buffers(): assert torch.equal(average.get_buffer(name), buffer), name
    assert not torch.equal(average.conv.weight, learn.model.conv.weight)


@pytest.mark.parametrize('batch_size, reference, rate', [(64, 64, 4e-3), (32, 64, 2e-3), (128, 64, 8e-3), (64, 1024, 2.5e-4)])
def test_the_rate_grows_with_the_batch(batch_size, reference, rate):
    learn = digits_learner(batch_size=batch_size, lr_batch_size=reference, lr=4e-3, warmup_epochs=0.)
    assert learn.lr == pytest.approx(rate)
    learn.create_opt()
    assert [group['lr'] for group in learn.opt.opt.param_groups] == pytest.approx([rate] * len(learn.opt.opt.param_groups))
    rates = Rates()
    learn.fit(1, cbs=rates)
    assert rates.seen[0]['head.weight'] == pytest.approx(rate), 'in the optimizer, at the first step'


def test_accumulation_divides_by_the_batches_of_the_step():
    "45 batches in steps of 7: the last step has 3."
    class Shares(Callback):
        run_valid = False
        def before_fit(self): self.seen = []
        def before_backward(self): self.seen.append(float(self.learn.loss.detach() / self.learn.loss_grad.detach()))
    class Steps(Callback):
        count = 0
        def after_step(self): self.count += 1
    learn = digits_learner([Shares(), Steps()], batch_size=224, grad_accum=7)
    n = len(learn.dls.train)
    assert n % 7 not in (0, 1)
    learn.fit(1)
    assert learn.shares.seen == pytest.approx([7.] * (n - n % 7) + [float(n % 7)] * (n % 7))
    assert learn.steps.count == math.ceil(n / 7)


@pytest.mark.parametrize('mixing, name', [(MixUp, 'mix_up'), (CutMix, 'cut_mix')], ids=['MixUp', 'CutMix'])
@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_fastais_own_mixing(mixing, name, smoothing):
    "The losses of both images of a mixture, image by image, and the learner's own loss in validation and afterwards."
    class Record(Callback):
        order, run_valid = 50, False
        def before_fit(self): self.seen = []
        def after_loss(self):
            mix, whole = getattr(self.learn, name), []
            for y in mix.yb1[0], self.learn.yb[0]:
                rows = y if y.ndim == 2 else F.one_hot(y, 10).float()
                assert_equal(rows.amin(), torch.tensor(smoothing / 10), 1e-7)          # smoothed once
                whole.append(-(rows * F.log_softmax(self.learn.pred, 1)).sum(1))
            self.seen.append((float(self.learn.loss.detach()), float(torch.lerp(*whole, mix.lam).mean().detach())))
    learn = digits_learner([mixing(), Record()], label_smoothing=smoothing)
    loss = learn.loss_func
    learn.fit(1)
    assert len(learn.record.seen) == len(learn.dls.train)
    assert [loss for loss, _ in learn.record.seen] == pytest.approx([expected for _, expected in learn.record.seen], rel=1e-5)
    assert learn.loss_func is loss and loss.reduction == 'mean'
    logits, labels = learn.get_preds(act=lambda x: x)
    assert learn.history[0]['valid_loss'] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_the_graph_of_losses():
    learn = digits_learner(ShowGraphCallback(), epochs=2)
    learn.fit()
    train, valid = learn.progress.mbar.axes.lines
    assert list(train.get_ydata()) == pytest.approx(learn.recorder.losses, rel=1e-6)
    assert list(valid.get_ydata()) == pytest.approx([row['valid_loss'] for row in learn.history])
    assert list(valid.get_xdata()) == [len(learn.dls.train), 2 * len(learn.dls.train)]


SCRIPT = '''
import sys; sys.path.insert(0, {tests!r})
from test_learner import digits_learner
digits_learner().fit()
'''


def test_a_log_is_plain_lines_and_a_terminal_gets_a_bar(tmp_path):
    script = tmp_path/'run.py'
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    command = [sys.executable, '-W', 'ignore', str(script)]
    ours, theirs = pty.openpty()
    on_terminal = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert '\r' not in piped and '\x1b' not in piped
    assert [line.split()[0] for line in piped.splitlines()] == ['epoch', '1']
    seen = b''
    while True:
        try: chunk = os.read(ours, 4096)
        except OSError: break                           # the other end is closed
        if not chunk: break
        seen += chunk
    assert on_terminal.wait() == 0
    assert b'epoch 1/1 train' in seen and b'%|' in seen and b'\r' in seen


def test_a_learner_that_never_trained_validates_and_predicts():
    learn = digits_learner()
    loss, share = learn.validate()
    assert learn.opt is None and loss == pytest.approx(math.log(10), abs=0.3) and 0 <= share <= 1
    assert learn.get_preds()[0].shape == (360, 10)


def test_tta_averages_predictions_of_augmented_images():
    learn = digits_learner(epochs=1)
    learn.fit()
    plain, labels = learn.get_preds()
    mixed, same = learn.tta(n=3, beta=0.25)
    assert mixed.shape == plain.shape and torch.equal(labels, same)
    assert_equal(mixed.sum(1), torch.ones(360), 1e-5)
    only, _ = learn.tta(n=2, beta=1.)
    assert_equal(only, plain, 1e-6)
    shifted = create_learner(learn.model, digits_dls(batch_size=64, size=8, shift=2), learn.recipe)
    augmented, _ = shifted.tta(n=2, beta=0.)
    assert not torch.allclose(augmented, plain, atol=1e-3), 'augmented as in training'
    again, _ = shifted.get_preds()
    assert_equal(again, plain, 1e-6)


def test_fastais_vision_learner_takes_our_loaders():
    from fastai.vision.all import resnet18, vision_learner
    from fastai.vision.all import accuracy as theirs
    learn = vision_learner(digits_dls(batch_size=64, channels=3), resnet18, pretrained=False, metrics=theirs)
    learn.fit(1, 1e-3)
    assert learn.loss_func is not None and len(learn.recorder.values) == 1


def test_the_loss_smooths_labels_as_the_recipe_says():
    "By hand: share e of the label over all classes."
    class Labels(Callback):
        order, run_valid = 50, False
        def before_batch(self): self.learn.rows = self.yb[0].clone()
    for share in (0.1, 0.3):
        learn = digits_learner(Labels(), label_smoothing=share)
        learn.fit(1)
        rows = learn.rows.sort(1).values
        assert_equal(rows, torch.tensor([[share / 10] * 9 + [1 - share + share / 10]]).expand_as(rows), 1e-6)


def test_the_cosine_ends_at_the_lowest_rate():
    "The last step is one step short of the end: the rate after it would be min_lr."
    learn = digits_learner(epochs=1, warmup_epochs=0., lr=1e-2, min_lr=1e-3)
    rates = Rates()
    learn.fit(1, cbs=rates)
    seen = [step['head.weight'] for step in rates.seen]
    n = len(seen)
    expected = [1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)]
    assert seen == pytest.approx(expected, rel=1e-5) and 1e-3 < seen[-1] < 1.1e-3


@pytest.mark.parametrize('decay', [0.5, 0.95])
def test_averaged_weights_follow_the_recurrence(decay):
    class Weights(Callback):
        order = 95
        def before_fit(self): self.seen = [self.model.head.weight.detach().clone()]
        def after_step(self): self.seen.append(self.model.head.weight.detach().clone())
    learn = digits_learner(Weights(), ema=True, ema_decay=decay)
    learn.fit(1)
    average = learn.weights.seen[0]
    for weight in learn.weights.seen[1:]: average = decay * average + (1 - decay) * weight
    assert_equal(learn.weight_average.average.module.head.weight, average, 1e-5)


def test_the_warm_up_is_a_line_from_the_first_rate_to_the_highest():
    learn = digits_learner(epochs=2, warmup_epochs=1., lr=1e-2, warmup_lr=2e-3, min_lr=1e-3)
    rates = Rates()
    learn.fit(cbs=rates)
    n = len(learn.dls.train)
    assert [step['head.weight'] for step in rates.seen[:n + 1]] == pytest.approx([2e-3 + 8e-3 * i / n for i in range(n + 1)], rel=1e-5)


def test_loaders_are_told_the_epoch():
    learn = digits_learner(epochs=3)
    class Told(Callback):
        order = 99
        def before_fit(self): self.seen = []
        def before_train(self): self.seen.append(self.dls.train.epoch)
    learn.add_cb(Told())
    for _ in range(2): learn.fit()                  # the loader itself would go on counting
    assert learn.told.seen == [0, 1, 2]


def test_the_rate_moves_only_where_a_step_begins():
    class EachBatch(Callback):
        order, run_valid = 90, False
        def before_fit(self): self.seen = []
        def before_backward(self): self.seen.append(self.opt.opt.param_groups[-1]['lr'])
    learn = digits_learner(EachBatch(), batch_size=128, grad_accum=4, warmup_epochs=0.)
    learn.fit(1)
    seen = learn.each_batch.seen
    n = len(seen)
    expected = [1e-5 + (learn.lr - 1e-5) * (1 + math.cos(math.pi * (i - i % 4) / n)) / 2 for i in range(n)]
    assert seen == pytest.approx(expected, rel=1e-4)


def test_fastais_mixup_gets_smoothed_labels():
    "Both images of a pair, whichever comes first: the recipe's smoothing runs before fastai's callback."
    class Rows(Callback):
        order, run_valid = 50, False
        def before_batch(self): self.learn.pairs = self.learn.mix_up.yb1[0], self.learn.yb[0]
    learn = digits_learner([MixUp(), Rows()], label_smoothing=0.1)
    learn.fit(1)
    for rows in learn.pairs: assert rows.shape[1] == 10 and float(rows.min()) == pytest.approx(0.01)


def test_tokens_and_tables_of_any_model_do_not_decay():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.cls_token = (torch.nn.Parameter(torch.zeros(1, n, 8)) for n in (4, 1))
            self.relative_position_bias_table = torch.nn.Parameter(torch.zeros(9, 2))
            self.head = torch.nn.Linear(8, 2)
    model = Plain()
    resting, decaying = by_decay(parameter_groups(model), model)
    assert decaying == {'head.weight'} and {'pos_embed', 'cls_token', 'relative_position_bias_table', 'head.bias'} == resting
