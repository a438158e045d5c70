"vdc_train and vdc_eval as a user has them: runs, resume after every kind of death, refusals, and Table 4 in effect on a tree of JPEG files."
import csv
import importlib.machinery
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
from fastai.basics import Callback
from forks import Running, run
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vitdynconv.train.checkpoint import FORMAT, CheckpointError, Checkpoints, RunStopped, load_checkpoint, save_weights
from vitdynconv.data import imagenet_dls
from vitdynconv.demo import demo_model
from vitdynconv.train.evaluate import read_run_weights, vdc_eval
from vitdynconv.train.logbook import EventFile, wandb_writer
from vitdynconv.train.recipes import RECIPES, Recipe
from vitdynconv.train.ending import Terminated, earlier_checkpoint, last_line, lower_rate_command
from vitdynconv.train.build import recipe_dls, recipe_model, weights_images
from vitdynconv.train.folder import check_out, open_run
from vitdynconv.train.record import LOCK, check_free
from vitdynconv.train.run import choose_recipe, vdc_train
from vitdynconv.train.session import given_back, run_learner

HARD = ['--epochs', '5', '--batch_size', '128', '--lr', '8e-3',   # all that makes exactness hard, on a few steps
        '--set', 'lr_batch_size=128 warmup_epochs=0.5 drop_path=0.1 ema=yes ema_decay=0.9 mixup=0.8 cutmix=1.0 grad_accum=2']
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']


def rows_of(folder): return list(csv.DictReader((folder/'history.csv').open()))
def same_bytes(a, b, *names): return all((a/name).read_bytes() == (b/name).read_bytes() for name in names)


def said(capsys, code, function, **arguments):
    "What a command says when it ends with `code`: one line."
    with pytest.raises(SystemExit) as end: function(**arguments)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == code and len(lines) == 1, lines
    return lines[0]


# A run

@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    code, out, errors = run(folder, '--recipe', 'digits', '--epochs', 3, '--out', 'RUN', '--log', 'tensorboard')
    assert code == 0, errors
    return folder/'RUN', out


def test_three_epochs_of_digits_pass_sixty_percent(digits_run):
    folder, out = digits_run
    assert float(rows_of(folder)[-1]['accuracy']) > 0.6
    assert 'finished: accuracy' in out and '\r' not in out and '\x1b' not in out


def test_a_run_is_a_folder_that_explains_itself(digits_run):
    folder, out = digits_run
    assert {'recipe.json', 'run.json', 'history.csv', 'curves.png', 'last.ckpt', 'model.safetensors'} <= {p.name for p in folder.iterdir()}
    assert Recipe.load(folder/'recipe.json') == RECIPES['digits'].replace(epochs=3)
    assert len(list(folder.glob('best-*.ckpt'))) == RECIPES['digits'].keep_best
    assert np.asarray(Image.open(folder/'curves.png').convert('L')).std() > 5, 'the curves are empty'
    assert [row['epoch'] for row in rows_of(folder)] == ['1', '2', '3']
    assert set(rows_of(folder)[0]) >= {'train_loss', 'valid_loss', 'accuracy', 'lr', 'seconds', 'images_per_second', 'data_wait', 'gradient_norm', 'peak_memory'}


def test_an_epoch_is_one_plain_line(digits_run):
    "Step lines are for epochs with more steps than --log-every."
    out = digits_run[1]
    assert 'step ' not in out and [line.split()[0] for line in out.splitlines() if re.match(r' +\d', line)] == ['1', '2', '3']
    assert len(out.splitlines()) == 3 + 1 + 3 + 1, out          # headline, names, epochs, end


def test_tensorboard_gets_the_same_rows(digits_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(digits_run[0])).Reload()
    assert [e.value for e in events.Scalars('valid_loss')] == pytest.approx([float(row['valid_loss']) for row in rows_of(digits_run[0])], rel=1e-6)


def test_an_event_that_was_half_written_is_taken_back(tmp_path):
    "The disk takes ten bytes of the second row and no more; when there is room, the file goes on where it was whole."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    write, rows, before = EventFile(tmp_path), [dict(epoch=1, valid_loss=2.), dict(epoch=2, valid_loss=1.)], resource.getrlimit(resource.RLIMIT_FSIZE)
    write(rows[:1])
    whole = write.path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
        with pytest.raises(OSError): write(rows)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert write.path.read_bytes() == whole
    write(rows)
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars('valid_loss')] == [1, 2]


def test_event_files_of_a_run_that_goes_on_replace_the_earlier_ones(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    rows = [dict(epoch=1, valid_loss=2.), dict(epoch=2, valid_loss=1.)]
    for number, known in enumerate((rows, rows[:1], rows)):
        write = EventFile(tmp_path)
        write.path = write.path.with_name(f'{write.path.name}.{number}')   # as of a later second
        write(known)
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars('valid_loss')] == [1, 2]


def test_weights_and_biases_gets_the_same_rows(tmp_path, monkeypatch):
    "Its client needs an account; what we hand it is seen by one of our own."
    calls = []
    page = types.SimpleNamespace(log=lambda row, step: calls.append((step, row['valid_loss'])))
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **options: calls.append(options) or page))
    write = wandb_writer(tmp_path/'RUN', TINY)
    for epoch in (1, 2): write([dict(epoch=1, valid_loss=2.), dict(epoch=2, valid_loss=1.)][:epoch])
    assert calls[0]['name'] == 'RUN' and calls[0]['config']['lr'] == TINY.lr and calls[0]['resume'] == 'allow'
    assert calls[1:] == [(1, 2.), (2, 1.)]


def test_a_tracker_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch, capsys):
    def refuse(**options): raise RuntimeError('no account:\n  wandb login')
    wandb = types.ModuleType('wandb')
    wandb.__spec__, wandb.init = importlib.machinery.ModuleSpec('wandb', None), refuse
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    assert '--log wandb cannot begin: no account: wandb login' in said(capsys, 2, vdc_train, out=str(tmp_path/'RUN'), log='wandb', epochs='1', depth='1')
    assert not list(tmp_path.iterdir())


class Handed:
    "A lock; as soon as it is released, another run begins in the folder."
    def __init__(self, folder): self.folder, self.lock = folder, open_run(folder, RECIPES['digits'], dict(data='', reader=''))
    def release(self):
        self.lock.release()
        self.next = open_run(self.folder, RECIPES['digits'], dict(data='', reader=''))


def test_a_start_that_fails_takes_no_file_of_the_next_one(tmp_path):
    lock = Handed(tmp_path/'RUN')
    with pytest.raises(RuntimeError, match='out of memory'), given_back(lock, tmp_path/'RUN'): raise RuntimeError('out of memory')
    assert {path.name for path in (tmp_path/'RUN').iterdir()} == {'recipe.json', 'run.json', LOCK}
    lock.next.release()


def test_a_run_that_goes_on_and_fails_keeps_its_folder(tmp_path):
    lock = open_run(tmp_path/'RUN', RECIPES['digits'], dict(data='', reader=''))
    with pytest.raises(KeyboardInterrupt), given_back(lock, None): raise KeyboardInterrupt
    assert {path.name for path in (tmp_path/'RUN').iterdir()} == {'recipe.json', 'run.json'}
    check_free(tmp_path/'RUN')


def test_a_finished_run_resumed_stays_as_it_is(digits_run, capsys):
    folder, _ = digits_run
    before = (folder/'model.safetensors').read_bytes(), rows_of(folder)
    vdc_train(resume=str(folder))
    assert 'going on after epoch 3 of 3' in capsys.readouterr().out
    assert ((folder/'model.safetensors').read_bytes(), rows_of(folder)) == before


def test_evaluation_agrees_with_the_history(digits_run, tmp_path, capsys):
    folder, _ = digits_run
    vdc_eval(checkpoint=str(folder/'model.safetensors'), csv=str(tmp_path/'r.csv'), json=str(tmp_path/'r.json'))
    assert 'top1' in capsys.readouterr().out
    (row,), last = json.loads((tmp_path/'r.json').read_text()), rows_of(folder)[-1]
    assert row['top1'] == pytest.approx(float(last['accuracy'])) and row['loss'] == pytest.approx(float(last['valid_loss']), rel=1e-5)
    assert row['images'] == 360 and row['top1'] < row['top5'] <= 1 and row['images_per_second'] > 0
    assert next(csv.DictReader((tmp_path/'r.csv').open()))['top1'] == str(row['top1'])


def test_evaluation_refuses_what_it_cannot_count(digits_run, tmp_path, capsys):
    folder, _ = digits_run
    assert '--checkpoint' in said(capsys, 2, vdc_eval, csv=str(tmp_path/'r.csv'))
    assert 'nowhere.ckpt does not exist' in said(capsys, 2, vdc_eval, checkpoint='nowhere.ckpt', csv=str(tmp_path/'r.csv'))
    assert 'averages none' in said(capsys, 2, vdc_eval, checkpoint=str(folder/'last.ckpt'), weights='ema')
    assert 'no safetensors file' in said(capsys, 2, vdc_eval, checkpoint=str(shutil.copy(folder/'history.csv', tmp_path/'a.safetensors')))
    assert not (tmp_path/'r.csv').exists()


# Deaths

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "A run that nobody disturbs."
    folder = tmp_path_factory.mktemp('straight')
    code, _, errors = run(folder, *HARD, '--out', 'RUN')
    assert code == 0, errors
    return folder/'RUN'


def test_killed_at_any_moment_it_ends_with_the_same_bits(straight, tmp_path):
    process = Running(tmp_path, *HARD, '--out', 'RUN')
    process.wait_until((tmp_path/'RUN/recipe.json').exists)
    process.signal(signal.SIGKILL)                             # before the first step
    process.end()
    process = Running(tmp_path, '--resume', 'RUN')
    process.wait_until((tmp_path/'RUN/history.csv').exists)
    process.signal(signal.SIGKILL)                             # in the second epoch
    process.end()
    for number, code, word in (signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated'):
        process = Running(tmp_path, '--resume', 'RUN')
        process.wait_until(lambda: 'going on' in process.output or 'step' in process.output)
        process.signal(number)                                 # Ctrl-C, and what a scheduler sends
        assert process.end()[0] == code and process.said.count('\n') == 1, process.said
        assert word in process.said and process.said.strip().endswith('vdc_train --resume RUN')
    assert load_checkpoint(tmp_path/'RUN/last.ckpt')['epoch'] in range(1, 5)
    code, out, errors = run(tmp_path, '--resume', 'RUN')
    assert code == 0, errors
    assert same_bytes(straight, tmp_path/'RUN', 'model.safetensors', 'model_ema.safetensors')
    a, b = [[(row['train_loss'], row['valid_loss'], row['ema_accuracy']) for row in rows_of(folder)] for folder in (straight, tmp_path/'RUN')]
    assert a == b and len(a) == 5


def test_killed_while_the_first_checkpoint_is_written_it_blocks_nothing(tmp_path):
    RECIPES['digits'].save(tmp_path/'recipe.json')
    (tmp_path/'run.json').write_text(json.dumps(dict(data='', reader='')))
    (tmp_path/'.last.ckpt.tmp').write_bytes(b'half of a checkpoint')
    assert check_out(tmp_path) == tmp_path
    open_run(tmp_path, RECIPES['digits'], dict(data='', reader='')).release()
    assert {path.name for path in tmp_path.iterdir()} == {'recipe.json', 'run.json'}


def test_one_command_begins_a_run_and_goes_on_with_it(straight, tmp_path, monkeypatch, capsys):
    "Again after each death, as `torchrun --max-restarts` starts it."
    again = [*HARD, '--out', 'RUN', '--resume', 'auto']
    process = Running(tmp_path, *again)
    process.wait_for('2')
    process.signal(signal.SIGKILL)
    process.end()
    code, out, errors = run(tmp_path, *again)
    assert code == 0 and 'going on after epoch' in out, errors
    assert same_bytes(straight, tmp_path/'RUN', 'model.safetensors', 'model_ema.safetensors')
    monkeypatch.chdir(tmp_path)
    assert 'another lr' in said(capsys, 2, vdc_train, resume='auto', out='RUN', epochs='5', batch_size='128', lr='1e-3',
                                set='lr_batch_size=128 warmup_epochs=0.5 drop_path=0.1 ema=yes ema_decay=0.9 mixup=0.8 cutmix=1.0 grad_accum=2')


@pytest.fixture
def small_disk():
    "A limit on file sizes: the first checkpoint, without the optimizer's moments, fits; the next does not."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(small_disk, tmp_path, capsys):
    words = said(capsys, 1, vdc_train, out=str(tmp_path/'RUN'), epochs='2')
    assert 'cannot write the checkpoint of epoch 1' in words and f'last good checkpoint: {tmp_path}/RUN/last.ckpt of epoch 0' in words
    assert load_checkpoint(tmp_path/'RUN/last.ckpt')['epoch'] == 0
    assert not list((tmp_path/'RUN').glob('.*'))


def test_a_folder_that_went_away_stops_the_run(tmp_path):
    learn, _ = run_learner(RECIPES['digits'].replace(epochs=2), tmp_path/'RUN', dict(data='', reader=''))
    shutil.rmtree(tmp_path/'RUN')
    with pytest.raises(RunStopped, match='none was written yet'): learn.fit()


def test_the_hint_of_several_processes_starts_several(tmp_path, monkeypatch):
    for name, value in dict(WORLD_SIZE='8', LOCAL_WORLD_SIZE='4').items(): monkeypatch.setenv(name, value)
    (tmp_path/'RUN').mkdir()
    RECIPES['digits'].save(tmp_path/'RUN/recipe.json')
    (tmp_path/'RUN/run.json').write_text('{"command": "vdc_train --recipe vdc_train.json --lr 3"}')
    start = 'torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --nproc_per_node 4 -m vitdynconv.train.run'
    for epoch, words in (0, f'--recipe vdc_train.json --out {tmp_path}/RUN'), (4, f'--resume {tmp_path}/RUN/last.ckpt --out {tmp_path}/RUN_lower'):
        torch.save(dict(format=FORMAT, epoch=epoch), tmp_path/'RUN/last.ckpt')
        assert lower_rate_command(tmp_path/'RUN') == f'{start} {words} --lr 0.0002'


def test_a_run_without_a_checkpoint_promises_none(tmp_path):
    (tmp_path/'run.json').write_text('{}')
    RECIPES['digits'].save(tmp_path/'recipe.json')
    for error in Terminated(), KeyboardInterrupt():
        assert 'last.ckpt' not in last_line(error, tmp_path)[0] and f'go on with: vdc_train --resume {tmp_path}' in last_line(error, tmp_path)[0]
    (tmp_path/'last.ckpt').touch()
    assert 'last.ckpt holds the finished epochs' in last_line(Terminated(), tmp_path)[0]


def test_the_hint_leads_out_of_a_nan(tmp_path, capsys):
    words = said(capsys, 1, vdc_train, out=str(tmp_path/'RUN'), epochs='2', lr='1000', batch_size='32')
    assert 'loss is nan at step' in words and f'last good checkpoint: {tmp_path/"RUN/last.ckpt"} of epoch 0' in words
    assert words.endswith(f'a lower rate may help: vdc_train --epochs 2 --batch_size 32 --out {tmp_path}/RUN --lr 100')
    assert all(bool(t.isfinite().all()) for t in load_checkpoint(tmp_path/'RUN/last.ckpt')['model'].values())
    vdc_train(out=str(tmp_path/'RUN'), epochs='1', batch_size='256')   # the folder of a run without an epoch blocks nothing
    assert len(rows_of(tmp_path/'RUN')) == 1


def test_a_run_begins_from_a_checkpoint_of_another_one(digits_run, tmp_path, monkeypatch, capsys):
    folder, _ = digits_run
    checkpoint = str(folder/'last.ckpt')
    assert lower_rate_command(folder) == f'vdc_train --resume {earlier_checkpoint(folder)} --out {folder}_lower --lr 0.0002'
    vdc_train(resume=checkpoint, out=str(tmp_path/'NEW'), epochs='4', lr='2e-4', batch_size=None)
    assert 'going on after epoch 3 of 4' in capsys.readouterr().out
    assert [row['epoch'] for row in rows_of(tmp_path/'NEW')] == ['1', '2', '3', '4'] and Recipe.load(tmp_path/'NEW/recipe.json').lr == 2e-4
    assert rows_of(tmp_path/'NEW')[:3] == rows_of(folder)
    assert float(rows_of(tmp_path/'NEW')[3]['lr']) < 2e-4 and len(rows_of(folder)) == 3
    write, written = Checkpoints.save, []
    def die(self, epoch):
        if written: raise KeyboardInterrupt
        written.append(epoch)
        write(self, epoch)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, 'save', die)
        assert 'go on with' in said(capsys, 130, vdc_train, resume=checkpoint, out=str(tmp_path/'CUT'), epochs='4')
    assert written == [3] and load_checkpoint(tmp_path/'CUT/last.ckpt')['epoch'] == 3, 'what it begins from is its own'
    for wrong, words in (dict(out=''), 'add --out'), (dict(embed_dim='48'), '--embed_dim cannot change'), (dict(epochs='3'), 'has 3 epochs'), (dict(recipe='digits'), 'leave it out'):
        assert words in said(capsys, 2, vdc_train, **dict(resume=checkpoint, out=str(tmp_path/'OTHER'), epochs='4') | wrong)
    assert not (tmp_path/'OTHER').exists()


class Infinite(Callback):
    "A loss that overflows in the third step of the second epoch."
    run_valid = False
    def after_loss(self):
        if (self.epoch, self.iter) == (1, 2): self.learn.loss_grad = self.learn.loss = self.learn.loss_grad + math.inf


def test_an_infinite_loss_stops_the_run_at_its_step(tmp_path):
    learn, _ = run_learner(RECIPES['digits'].replace(epochs=2, batch_size=128), tmp_path/'RUN', dict(data='', reader=''), log_every=5)
    learn.add_cb(Infinite())
    steps = len(learn.dls.train)
    with pytest.raises(RunStopped, match=f'the loss is inf at step {steps + 3} .epoch 2., learning rate .*RUN/last.ckpt of epoch 1'): learn.fit()


class Pictures(Callback):
    "The files that are there after each epoch."
    order = 99
    def before_fit(self): self.seen = []
    def after_epoch(self): self.seen.append(tuple((self.path/name).read_bytes() for name in ('curves.png', 'history.csv', 'last.ckpt')))


def test_curves_history_and_checkpoint_are_there_after_each_epoch(tmp_path):
    learn, _ = run_learner(RECIPES['digits'].replace(epochs=3, batch_size=256), tmp_path/'RUN', dict(data='', reader=''))
    learn.add_cb(Pictures())
    learn.fit()
    assert [len(set(files)) for files in zip(*learn.pictures.seen)] == [3, 3, 3]


@pytest.fixture
def copied(digits_run, tmp_path): return shutil.copytree(digits_run[0], tmp_path/'RUN')


def test_a_truncated_checkpoint_is_refused(copied, capsys):
    size = (copied/'last.ckpt').stat().st_size
    for part in (0, 100, size // 2, size - 1):
        (copied/'cut').write_bytes((copied/'last.ckpt').read_bytes()[:part])
        with pytest.raises(CheckpointError, match=f'damaged, cut short or not a checkpoint .{part:,} bytes'): load_checkpoint(copied/'cut')
    os.replace(copied/'cut', copied/'last.ckpt')
    words = said(capsys, 2, vdc_train, resume=str(copied))
    assert 'damaged' in words and ': cp ' in words and 'best-000' in words


class Trap:
    "What a malicious file holds."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save(dict(format='vitdynconv checkpoint 1', model=Trap(str(tmp_path/'trap'))), tmp_path/'a.ckpt')
    (tmp_path/'b.ckpt').write_bytes(pickle.dumps(Trap(str(tmp_path/'trap'))))
    for name in ('a.ckpt', 'b.ckpt'):
        with pytest.raises(CheckpointError, match='more than tensors'): load_checkpoint(tmp_path/name)
    assert not (tmp_path/'trap').exists()


def test_a_foreign_checkpoint_is_refused(copied, capsys):
    torch.save(dict(state_dict={}, epoch=3), copied/'last.ckpt')
    assert "holds keys ['state_dict', 'epoch']" in said(capsys, 2, vdc_train, resume=str(copied))


def test_a_checkpoint_of_another_recipe_is_refused(copied, capsys):
    RECIPES['digits'].replace(epochs=9).save(copied/'recipe.json')
    assert 'another epochs than recipe.json' in said(capsys, 2, vdc_train, resume=str(copied))


@pytest.mark.parametrize('arguments, words', [
    (dict(), '--out'),
    (dict(out='RUN', resume='RUN'), '--out'),
    (dict(resume='RUN'), 'it has no recipe.json'),
    (dict(resume='RUN', epochs='3'), 'a run keeps its recipe'),
    (dict(out='RUN', recipe='deit_x'), 'choose from deit_s'),
    (dict(out='RUN', epochs='0'), 'epochs=0'),
    (dict(out='RUN', epochs='many'), "epochs='many'"),
    (dict(out='RUN', set='warmth=1'), "no 'warmth'"),
    (dict(out='RUN', set='warmth'), 'field=value'),
    (dict(out='RUN', set='warmup_epochs=20'), 'warmup_epochs'),
    (dict(out='RUN', recipe='deit_s', epochs='2', warmup_epochs='3'), 'add --warmup_epochs 0.13'),
    (dict(out='RUN', opt='adamx'), "opt='adamx'"),
    (dict(out='RUN', num_heads='0'), 'num_heads=0'),
    (dict(out='RUN', activation='lnrelu'), 'ln_relu'),
    (dict(out='RUN', kernel='sparse'), 'depthwise'),
    (dict(out='RUN', model='deit_smal_patch16_224'), 'deit_small_patch16_224'),
    (dict(out='RUN', recipe='swin_t'), '--data'),
    (dict(out='RUN', recipe='swin_t', data='nowhere'), 'nowhere'),
    (dict(out='RUN', log='paper'), 'tensorboard'),
    (dict(out='file'), 'is a file'),
    (dict(out='full'), 'not empty'),
    (dict(out='file/RUN'), 'not a folder'),
])
def test_bad_input_is_one_line_and_leaves_nothing(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').write_text('')
    (tmp_path/'full').mkdir()
    (tmp_path/'full/thing').write_text('')
    before = sorted(tmp_path.rglob('*'))
    assert words in said(capsys, 2, vdc_train, **arguments)
    assert sorted(tmp_path.rglob('*')) == before


def test_the_option_that_an_error_proposes_helps():
    assert choose_recipe('deit_s', dict(epochs='2', warmup_epochs='0.13')) == RECIPES['deit_s'].replace(epochs=2, warmup_epochs=0.13)


# A recipe decides data and model

@pytest.mark.parametrize('changes, tokens', [({}, 16), (dict(img_size=24), 36), (dict(img_size=24, class_token=True), 37), (dict(class_token=True), 17)])
def test_input_size_and_class_token_of_digits_reach_data_and_model(changes, tokens):
    recipe = RECIPES['digits'].replace(**changes)
    images, _ = recipe_dls(recipe).valid.one_batch()
    assert images.shape[1:] == (1, recipe.img_size, recipe.img_size)
    for model in (recipe_model(recipe), demo_model('ln_relu', recipe)):
        assert model.forward_features(images).shape[1] == tokens and model.patch_embed.img_size == images.shape[2:]
        if not recipe.class_token: continue
        torch.nn.init.normal_(model.head.weight)
        before = model.eval()(images)
        torch.nn.init.normal_(model.cls_token, std=3.)
        assert not torch.allclose(model(images), before), 'the head reads the class token'


def test_a_command_line_with_another_input_size_trains(tmp_path):
    vdc_train(out=str(tmp_path/'RUN'), epochs='1', warmup_epochs='0.1', batch_size='256', set='img_size=8 class_token=yes')
    weights = read_run_weights(tmp_path/'RUN/model.safetensors')[1]
    assert weights['pos_embed'].shape[1] == 5 and 'cls_token' in weights


# Table 4 on real JPEG files

def write_tree(root, classes=4, train=24, valid=5):
    "Digits as JPEG files, in folders as ImageNet has them."
    digits = load_digits()
    for c in range(classes):
        images = digits.images[digits.target == c]
        for split, part in (('train', images[:train]), ('validation', images[train:train + valid])):
            (root/split/f'digit_{c}').mkdir(parents=True)
            for i, image in enumerate(part):
                Image.fromarray((image * 15.9).astype('uint8')).resize((40, 40)).convert('RGB').save(root/split/f'digit_{c}'/f'{i:03}.jpg')
    return root


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return write_tree(tmp_path_factory.mktemp('tree'))


TINY = RECIPES['deit_s'].replace(   # Table 4's, but for the size of model, data and batch
    model='vit_tiny_patch16_224', model_args=dict(patch_size=8), depth=2, embed_dim=32, num_heads=2, num_classes=4, img_size=32,
    epochs=2, warmup_epochs=1., batch_size=16, lr_batch_size=16, workers=0)


class Watch(Callback):
    "Everything that a step sees."
    order = 95
    def before_fit(self): self.labels, self.norms, self.rates, self.biases = [], [], [], [self.model.head.bias.detach().clone()]
    def before_step(self):
        self.labels.append(self.yb[0].clone())
        self.norms.append((float(self.learn.gradient_norm), float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm())))
        self.rates.append([group['lr'] for group in self.opt.opt.param_groups])
    def after_step(self): self.biases.append(self.model.head.bias.detach().clone())


@pytest.fixture(scope='module')
def watched(tree, tmp_path_factory):
    torch.manual_seed(0)
    learn, _ = run_learner(TINY, tmp_path_factory.mktemp('table4')/'RUN', dict(data=str(tree), reader=''))
    learn.add_cb(Watch())
    learn.fit()
    return learn


def test_labels_are_mixed_and_smoothed(watched):
    rows = torch.cat(watched.watch.labels)
    assert torch.allclose(rows.sum(1), torch.ones(len(rows)))
    assert float(rows.min()) == pytest.approx(0.1 / 4), 'label smoothing'
    two = (rows > 0.1 / 4 + 1e-6).sum(1) == 2
    assert 0.4 < float(two.float().mean()) < 1 and int((rows > 0.1 / 4 + 1e-6).sum(1).max()) == 2


def test_mixup_and_cutmix_both_happen(watched):
    mixup = watched.mixing.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    whole, boxes = 0, 0
    for _ in range(40):
        x = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
        mixed = mixup(x, torch.tensor([0, 1]))[0][0]
        whole += bool(((mixed > 0) & (mixed < 1)).all())          # an overlay changes every pixel
        boxes += bool(((mixed == 0) | (mixed == 1)).all())        # a box leaves pixels as they are
    assert whole > 5 and boxes > 5 and whole + boxes == 40


def test_each_image_is_repeated_across_ranks(tree):
    ranks = [imagenet_dls(tree, recipe=TINY.replace(batch_size=12), rank=rank, world=3, device='cpu').train for rank in range(3)]
    numbers = torch.stack([loader.draws()[1] for loader in ranks])
    assert bool((numbers == numbers[0]).all()) and len(set(numbers[0].tolist())) == len(numbers[0])
    pictures = [loader.one_batch()[0][0] for loader in ranks]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2]), 'each rank augments its own way'


def test_boxes_are_erased(tree):
    erased, whole = [[torch.cat([x for x, _ in loader]) for loader in [imagenet_dls(tree, recipe=TINY, random_erasing=share, device='cpu').train]][0]
                     for share in (0.25, 0.)]
    changed = (erased != whole).any(1)                            # (b, h, w)
    hit = changed.flatten(1).any(1)
    assert 0.08 < float(hit.float().mean()) < 0.45
    for mask in changed[hit]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].float().mean() > 0.95, 'what is erased is a box'
    assert erased[changed[:, None].expand_as(erased)].std() > 0.5, 'pixel by pixel noise, no flat colour'


def test_epochs_differ_in_order_and_augmentation(tree, watched):
    loader = recipe_dls(TINY, str(tree), device='cpu').train
    orders, pictures = [], []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append(loader.draws()[1])
        pictures.append(loader.one_batch()[0])
    assert not torch.equal(*orders) and not torch.equal(*pictures)
    assert watched.dls.train.epoch >= 1, 'the learner tells the loader which epoch it is'


def test_decay_groups(watched):
    assert type(watched.opt.opt) is torch.optim.AdamW
    names = {id(p): n for n, p in watched.model.named_parameters()}
    groups = {0.: set(), 0.05: set()}
    for group in watched.opt.opt.param_groups: groups[group['weight_decay']] |= {names[id(p)] for p in group['params']}
    assert {'cls_token', 'pos_embed', 'norm.weight', 'head.bias', 'blocks.0.attn.qkv.bias'} <= groups[0.]
    assert {'patch_embed.proj.weight', 'blocks.1.mlp.fc2.weight', 'head.weight'} <= groups[0.05]


def test_learning_rate_trace(watched):
    steps = 2 * len(watched.dls.train)
    half = steps // 2
    up = [1e-6 + (1e-3 - 1e-6) * i / half for i in range(half)]
    down = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / half)) / 2 for i in range(half)]
    expected = up + down
    assert [rates[0] for rates in watched.watch.rates] == pytest.approx(expected)
    assert expected[0] == pytest.approx(1e-6) and max(expected) == pytest.approx(1e-3) and expected.index(max(expected)) == steps // 2
    assert all(len(set(rates)) == 1 for rates in watched.watch.rates)


def test_gradients_are_clipped(watched):
    assert watched.clip_norm.max_norm == 5.0
    for found, used in watched.watch.norms: assert used == pytest.approx(min(found, 5.0), rel=1e-3)


def test_averaged_weights(watched):
    average = watched.watch.biases[0]
    for bias in watched.watch.biases[1:]: average = 0.99996 * average + 0.00004 * bias
    assert torch.allclose(watched.weight_average.average.module.head.bias, average, atol=1e-7)
    assert all('ema_accuracy' in row for row in watched.history)


def test_stochastic_depth(watched):
    assert [block.drop_path1.drop_prob if hasattr(block.drop_path1, 'drop_prob') else 0. for block in watched.model.blocks] == pytest.approx([0., 0.1])
    x = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        watched.model.train()
        differs = (watched.model(x) != watched.model(x)).any(1).float().mean()
        watched.model.eval()
        assert torch.equal(watched.model(x), watched.model(x))
    assert 0.1 < float(differs) < 0.6, 'some images skip a branch, most do not'


def test_a_tree_trained_by_the_command_and_evaluated(tree, tmp_path, capsys):
    bad = shutil.copytree(tree, tmp_path/'tree')
    (bad/'train/digit_1/003.jpg').write_bytes(b'not an image')
    TINY.replace(workers=1).save(tmp_path/'recipe.json')
    vdc_train(data=str(bad), recipe=str(tmp_path/'recipe.json'), activation='ln_relu', pos='rel', out=str(tmp_path/'RUN'))
    out = capsys.readouterr().out
    assert 'going' not in out and '1 training images could not be read so far' in out and '003.jpg' in out
    assert rows_of(tmp_path/'RUN')[-1]['skipped_images'] == '1'
    recipe, tensors, run = read_run_weights(tmp_path/'RUN/last.ckpt', 'ema')
    assert (recipe.activation, recipe.pos, run['data']) == ('ln_relu', 'rel', str(bad)) and any('relative_position' in name for name in tensors)
    vdc_eval(checkpoint=str(tmp_path/'RUN/last.ckpt'), weights='ema', json=str(tmp_path/'r.json'))
    (row,) = json.loads((tmp_path/'r.json').read_text())
    assert row['images'] == 20 and row['top1'] == pytest.approx(float(rows_of(tmp_path/'RUN')[-1]['ema_accuracy']))


def test_a_swin_trained_by_the_command(tree, tmp_path):
    body = json.dumps(dict(patch_size=2, depths=[1, 1], window_size=4), separators=(',', ':'))
    vdc_train(data=str(tree), recipe='swin_t', activation='ln_relu', out=str(tmp_path/'RUN'), epochs='1', warmup_epochs='0.5', batch_size='32', workers='0',
              set=f"num_classes=4 img_size=32 embed_dim=16 num_heads=[2,4] 'model_args={body}'")
    recipe, tensors, _ = read_run_weights(tmp_path/'RUN/model.safetensors')
    assert (recipe.name, recipe.drop_path, recipe.activation) == ('swin_t', 0.2, 'ln_relu')
    assert any(name.endswith('relative_position_bias_table') for name in tensors) and any('.act.' in name for name in tensors)


def test_dropout_is_in_effect():
    x = torch.randn(8, 3, 32, 32)
    for drop in (0., 0.3):
        model = recipe_model(TINY.replace(drop=drop, drop_path=0.)).train()
        torch.nn.init.normal_(model.head.weight)
        assert torch.equal(model(x), model(x)) == (drop == 0)


def test_images_are_prepared_as_pretrained_weights_expect(tree, tmp_path):
    "timm's ViT-S was trained with 0.5 for mean and deviation; nothing is downloaded, the facts come with timm."
    plain = TINY.replace(model='vit_small_patch16_224', img_size=32)
    tuned = plain.replace(pretrained=True)
    assert weights_images(plain) == {} and weights_images(TINY.replace(pretrained=True, model='deit_small_patch16_224')) == dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    (usual, _), (halves, _) = (recipe_dls(recipe, str(tree)).valid.one_batch() for recipe in (plain, tuned))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    assert torch.allclose(usual * std + mean, halves * 0.5 + 0.5, atol=1e-5) and not torch.allclose(usual, halves, atol=0.1)
    assert weights_images(tuned.replace(crop_pct=None, interpolation=None)) == dict(mean=(.5,) * 3, std=(.5,) * 3, crop_pct=.9, interpolation='bicubic')
    train = recipe_dls(tuned, str(tree)).train.dataset
    assert train.mean == train.std == (.5,) * 3, 'training images, too'


def test_evaluation_prepares_images_as_training_did(tree, tmp_path):
    recipe = TINY.replace(model='vit_small_patch16_224', pretrained=True, ema=False)
    model = recipe_model(recipe).eval()
    torch.nn.init.normal_(model.head.weight)
    save_weights(tmp_path/'model.safetensors', model, recipe)
    vdc_eval(checkpoint=str(tmp_path/'model.safetensors'), data=str(tree), json=str(tmp_path/'r.json'))
    loss = {}
    for middle in (0.5, 0.4):
        batches = list(imagenet_dls(tree, recipe=recipe, mean=(middle,) * 3, std=(.5,) * 3, device='cpu').valid)
        with torch.no_grad(): logits = torch.cat([model(x) for x, _ in batches])
        loss[middle] = float(torch.nn.functional.cross_entropy(logits, torch.cat([y for _, y in batches])))
    measured = json.loads((tmp_path/'r.json').read_text())[0]['loss']
    assert measured == pytest.approx(loss[0.5], rel=1e-4) and measured != pytest.approx(loss[0.4], rel=1e-3)


def test_classes_that_do_not_match_stop_before_anything_is_written(tree, tmp_path, capsys):
    words = said(capsys, 2, vdc_train, data=str(tree), recipe='deit_s', out=str(tmp_path/'RUN'), batch_size='16')
    assert '4 classes' in words or 'has 4' in words
    assert list(tmp_path.iterdir()) == []
