"What a checkpoint keeps: everything that training depends on, and the best epochs, not the worst."
from types import SimpleNamespace

import pytest
import torch
from fastai.basics import Callback
from test_learner import digits_learner

from vitdynconv.train.session import finish
from vitdynconv.train.checkpoint import CheckpointError, Checkpoints, best_epochs, keep_best, load_checkpoint, restore, score


def history(*accuracies, ema=None):
    rows = [dict(epoch=i, accuracy=a) for i, a in enumerate(accuracies, 1)]
    for row, value in zip(rows, ema or []): row['ema_accuracy'] = value
    return rows


@pytest.mark.parametrize('rows, k, best', [
    (history(.1, .9, .5, .7), 1, [2]), (history(.1, .9, .5, .7), 2, [2, 4]), (history(.1, .9, .5, .7), 9, [2, 4, 3, 1]), (history(.1, .9), 0, []),
    (history(.5, .5, .4), 1, [2]), (history(.1, .2, ema=[.9, .3]), 1, [1]), (history(None, .1), 1, [2]), ([], 3, [])])
def test_the_best_epochs_are_those_with_the_highest_accuracy(rows, k, best):
    assert best_epochs(rows, k) == best


def test_the_last_line_names_the_epoch_whose_file_was_kept(tmp_path, capsys):
    "Of equal epochs the later one counts, for the files and for the line that a run ends with."
    learn = digits_learner(path=tmp_path)
    learn.checkpoints = SimpleNamespace(run_args={})
    learn.history = [dict(epoch=1, accuracy=.5), dict(epoch=2, accuracy=.9), dict(epoch=3, accuracy=.9), dict(epoch=4, accuracy=.8)]
    finish(learn, tmp_path)
    assert best_epochs(learn.history, 1) == [3] and "best 0.9000 in epoch 3;" in capsys.readouterr().out


def test_the_best_checkpoints_stay_on_the_disk(tmp_path):
    accuracies = [.3, .8, .1, .7, .75, .2]
    for n in range(1, 7):
        (tmp_path/'last.ckpt').unlink(missing_ok=True)
        (tmp_path/'last.ckpt').write_text(f'epoch {n}')
        keep_best(tmp_path, history(*accuracies[:n]), 2)
        kept = {path.name for path in tmp_path.glob('best-*')}
        assert kept == {f'best-{epoch:04d}.ckpt' for epoch in sorted(range(1, n + 1), key=lambda e: -accuracies[e - 1])[:2]}
    assert (tmp_path/'best-0002.ckpt').read_text() == 'epoch 2'
    assert score(dict(accuracy=.2, ema_accuracy=.4)) == .4 and score(dict(accuracy=None)) == 0.


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def broken(*_): raise OSError('no hard links here')
    monkeypatch.setattr('os.link', broken)
    (tmp_path/'last.ckpt').write_text('epoch 1')
    keep_best(tmp_path, history(.3), 1)
    assert (tmp_path/'best-0001.ckpt').read_text() == 'epoch 1'


class Scaler(Callback):
    "What fp16 training has: a factor that changes as steps overflow or do not."
    order = 11
    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 4, growth_interval=3)
        self.scales = []
    def before_step(self): self.scales.append(self.scaler.get_scale())
    def after_step(self):
        self.scaler.scale(torch.ones(()))           # makes the scale, at the first step
        self.scaler.update(self.scaler.get_scale() * 2)


class Stop(Callback):
    def before_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt


def test_the_gradient_scaler_goes_on_where_it_was(tmp_path):
    def learner(*cbs): return digits_learner([Scaler(), Checkpoints(tmp_path), *cbs], batch_size=256, epochs=2, warmup_epochs=0.)
    whole = learner()
    whole.fit()
    steps = len(whole.dls.train)
    first = learner(Stop())
    with pytest.raises(KeyboardInterrupt): first.fit()
    state = load_checkpoint(tmp_path/'last.ckpt')
    assert state['epoch'] == 1 and state['scaler']['scale'] == 2. ** (4 + steps)
    resumed, seen = learner(), []
    class Look(Callback):
        order = 1001
        def before_fit(self): seen.append(self.scaler.state_dict()['scale'])
    resumed.fit(start_epoch=restore(resumed, state), cbs=Look())
    assert seen == [2. ** (4 + steps)]


class Count(Callback):
    "The number of the step, as logs and trackers see it."
    order, run_valid = 99, False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append((self.train_iter, round(self.pct_train * self.n_iter * self.n_epoch)))


def test_steps_are_counted_from_the_start_of_the_run(tmp_path):
    def learner(*cbs): return digits_learner([Count(), Checkpoints(tmp_path), *cbs], batch_size=256, epochs=3, warmup_epochs=0.)
    first = learner(Stop())
    with pytest.raises(KeyboardInterrupt): first.fit()
    resumed = learner()
    resumed.fit(start_epoch=restore(resumed, load_checkpoint(tmp_path/'last.ckpt')))
    n = len(resumed.dls.train)
    assert [iteration for iteration, _ in resumed.count.seen] == list(range(n + 1, 3 * n + 1))
    assert [share for _, share in resumed.count.seen] == list(range(n + 1, 3 * n + 1))
    assert resumed.epoch == 2 and [row['epoch'] for row in resumed.history] == [1, 2, 3]


def test_a_checkpoint_holds_everything(tmp_path):
    learn = digits_learner(Checkpoints(tmp_path), batch_size=256, epochs=1, ema=True, ema_decay=0.9)
    learn.fit()
    state = load_checkpoint(tmp_path/'last.ckpt')
    assert set(state) >= {'model', 'optimizer', 'scaler', 'ema', 'rng', 'history', 'epoch', 'recipe', 'run'}
    moments = state['optimizer']['state']
    assert len(moments) == len(list(learn.model.parameters())) and all({'exp_avg', 'exp_avg_sq', 'step'} <= set(each) for each in moments.values())
    assert set(state['rng'][0]) >= {'python', 'numpy', 'torch'}


def test_the_groups_of_a_resumed_optimizer_are_those_of_the_run(tmp_path):
    learn = digits_learner(Checkpoints(tmp_path), batch_size=256, epochs=1, layer_decay=0.5)
    learn.fit()
    again = digits_learner(batch_size=256, epochs=1, layer_decay=0.5)
    restore(again, load_checkpoint(tmp_path/'last.ckpt'))
    keys = ('lr', 'weight_decay', 'depth', 'decays', 'lr_scale')
    here, there = [[{key: group[key] for key in keys} for group in each.opt.opt.param_groups] for each in (learn, again)]
    assert here == there
    again.freeze()
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == {'head.weight', 'head.bias'}


HARD = dict(batch_size=128, epochs=2, warmup_epochs=0.5, mixup=0.8, cutmix=1.0, ema=True, ema_decay=0.9, grad_accum=2)


def test_a_restored_learner_ends_with_the_same_bits(tmp_path):
    "Weights, averages, moments and random numbers: with drop path and mixing, nothing may be missing."
    from test_learner import small_vit
    def learner(folder, *cbs): return digits_learner([Checkpoints(folder), *cbs], model=small_vit(drop_path_rate=0.3, proj_drop_rate=0.1), **HARD)
    whole = learner(tmp_path/'whole')
    (tmp_path/'whole').mkdir()
    (tmp_path/'cut').mkdir()
    whole.fit()
    with pytest.raises(KeyboardInterrupt): learner(tmp_path/'cut', Stop()).fit()
    resumed = learner(tmp_path/'cut')
    torch.randn(1)
    resumed.fit(start_epoch=restore(resumed, load_checkpoint(tmp_path/'cut/last.ckpt')))
    a, b = load_checkpoint(tmp_path/'whole/last.ckpt'), load_checkpoint(tmp_path/'cut/last.ckpt')
    for part in ('model', 'ema'):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part
    for key, moments in a['optimizer']['state'].items():
        assert all(torch.equal(moments[name], b['optimizer']['state'][key][name]) for name in moments)
    strip = lambda rows: [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]
    assert strip(a['history']) == strip(b['history'])


def test_a_text_file_is_answered_in_words(tmp_path):
    (tmp_path/'note.txt').write_text('hi\n')
    with pytest.raises(CheckpointError, match=r'note.txt is damaged, cut short or not a checkpoint \(3 bytes\): torch.save has not written it'):
        load_checkpoint(tmp_path/'note.txt')
