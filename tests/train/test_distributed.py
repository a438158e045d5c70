"Several processes: the same training as one, every image once, and an end with an error when one of them dies."
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from forks import Running, run
from PIL import Image
from test_train import TINY, TORCHRUN, rows_of, same_bytes, tree  # noqa: F401 (a fixture)

from vitdynconv.train.checkpoint import load_checkpoint, save_weights
from vitdynconv.data import digits_dls
from vitdynconv.train.evaluate import vdc_eval
from vitdynconv.train.learner import attempt_store
from vitdynconv.train.recipes import RECIPES
from vitdynconv.train.build import recipe_dls, recipe_model

# no drop path and no mixing: those are drawn by each process, and would differ from one process's
EVEN = ['--epochs', '2', '--batch_size', '128', '--set', 'lr_batch_size=128 warmup_epochs=0.5 ema=yes ema_decay=0.9 grad_accum=2']

ONE_EPOCH = ['--epochs', '1', *EVEN[2:]]


PICTURES = dict(epochs='2', img_size='16', depth='1', embed_dim='32', num_heads='2', workers='0', rand_augment='')


def write_pictures(root, images):
    "A folder for each of three colours."
    for name, colour in dict(blue=(40, 60, 220), green=(30, 200, 60), red=(220, 40, 30)).items():
        (root/name).mkdir(parents=True)
        for number in range(images): Image.new('RGB', (20 + number, 20), colour).save(root/name/f'{name}_{number:02}.png')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    code, _, errors = run(folder, *EVEN, '--out', 'one')
    assert code == 0, errors
    for name, more in ('two', []), ('shared', ['--shard']):
        code, _, errors = run(folder, *EVEN, *more, '--out', name, processes=2)
        assert code == 0, errors
    return folder


@pytest.mark.parametrize('name', ['two', 'shared'])
def test_two_processes_have_the_curve_of_one(runs, name):
    one, two = rows_of(runs/'one'), rows_of(runs/name)
    for column in ('train_loss', 'valid_loss', 'lr', 'gradient_norm'):
        assert [float(row[column]) for row in two] == pytest.approx([float(row[column]) for row in one], rel=1e-4), column
    for column in ('accuracy', 'ema_accuracy'): assert [row[column] for row in two] == [row[column] for row in one]


@pytest.mark.parametrize('name', ['two', 'shared'])
@pytest.mark.parametrize('file', ['model.safetensors', 'model_ema.safetensors', 'best.safetensors'])
def test_two_processes_have_the_weights_of_one(runs, name, file):
    "Within float32 rounding. Softmax does not see the keys' bias: its gradient is nothing but rounding, which Adam makes a step of."
    one, two = load_file(runs/'one'/file), load_file(runs/name/file)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        difference = (weight - two[name]).abs()
        if name.endswith('qkv.bias'): difference = difference.view(3, -1)[[0, 2]]
        assert float(difference.max()) < 2e-5, name
    assert max(float((one[name] - weight).abs().max()) for name, weight in recipe_model(RECIPES['digits']).state_dict().items()) > 0.01, 'nothing was trained'


def test_a_shared_network_is_kept_whole(runs):
    "A checkpoint with and without `--shard` has the same names and shapes, so either goes on from it."
    one, shared = (load_checkpoint(runs/name/'last.ckpt') for name in ('one', 'shared'))
    for part in 'model', 'ema':
        assert {name: value.shape for name, value in one[part].items()} == {name: value.shape for name, value in shared[part].items()}
    for number, moments in one['optimizer']['state'].items():
        assert {name: value.shape for name, value in moments.items()} == {name: value.shape for name, value in shared['optimizer']['state'][number].items()}


@pytest.mark.parametrize('name, more', [('two', []), ('shared', ['--shard'])])
def test_a_dead_process_ends_the_run_and_the_resumed_one_has_the_same_bits(runs, tmp_path, name, more):
    process = Running(tmp_path, *EVEN, *more, '--out', 'RUN', processes=2)
    process.wait_until((tmp_path/'RUN/history.csv').exists)        # it is written after the first checkpoint
    dead = random.randrange(2)
    process.signal(signal.SIGKILL, dead)
    code, _, errors = process.end(120)
    assert code != 0, 'a run that lost a process is no success'
    assert not (tmp_path/'RUN/model.safetensors').exists()
    last = errors.strip().splitlines()[-1]
    assert 'another process died' in last and last.endswith('torchrun --nproc_per_node 2 -m vitdynconv.train.run --resume RUN'), (dead, errors)
    code, out, errors = run(tmp_path, '--resume', 'RUN', processes=2)
    assert code == 0 and 'going on after epoch 1 of 2' in out, errors
    assert same_bytes(runs/name, tmp_path/'RUN', 'model.safetensors', 'model_ema.safetensors')


def test_a_run_on_another_number_of_processes_says_that_it_is_not_exact(runs, tmp_path):
    for name in 'two', 'shared':
        shutil.copytree(runs/name, tmp_path/name)
        code, out, errors = run(tmp_path, '--resume', name)
        assert code == 0 and 'the run had 2 processes and has 1: it goes on, but not exactly' in out, errors


def test_processes_that_share_a_network_validate_different_numbers_of_batches(tmp_path):
    "Nine held-out pictures: two batches for the one, one for the other, which waits for the first."
    write_pictures(tmp_path/'pictures', images=15)
    words = ['--data', 'pictures', *(word for name, value in PICTURES.items() for word in (f'--{name}', value)), '--batch_size', '8']
    results = {}
    for name, more in ('whole', []), ('shared', ['--shard']):
        code, _, errors = run(tmp_path, *words, *more, '--out', name, '--timeout', '60', processes=2)
        assert code == 0, errors
        results[name] = [(row['accuracy'], row['ema_accuracy']) for row in rows_of(tmp_path/name)]
    assert results['whole'] == results['shared']


@pytest.mark.parametrize('more', [[], ['--shard']])
def test_what_was_not_written_is_made_up_for_by_all_processes(tmp_path, more):
    "The picture excepted where no process has the whole network."
    code, _, errors = run(tmp_path, *ONE_EPOCH, *more, '--out', 'RUN', processes=2)
    assert code == 0, errors
    kept = {name: (tmp_path/'RUN'/name).read_bytes() for name in ('best.safetensors', 'history.csv', 'mistakes.png')}
    for name in (*kept, 'curves.png'): (tmp_path/'RUN'/name).unlink()
    code, _, errors = run(tmp_path, '--resume', 'RUN', processes=2)
    assert code == 0 and (tmp_path/'RUN/curves.png').exists(), errors
    if more: assert not (tmp_path/'RUN/mistakes.png').exists() and kept.pop('mistakes.png')
    assert {name: (tmp_path/'RUN'/name).read_bytes() for name in kept} == kept


def test_one_process_has_nothing_to_share(tmp_path):
    code, _, errors = run(tmp_path, *EVEN, '--shard', '--out', 'RUN')
    assert code == 2 and 'start several with torchrun' in errors and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_loses_processes_ends_by_itself(runs, tmp_path):
    "torchrun starts the same command again, which goes on: bit for bit what an undisturbed run gives."
    words = [*TORCHRUN, '2', '--max-restarts', '3', '-m', 'vitdynconv.train.run', *EVEN, '--out', 'RUN', '--resume', 'auto']
    with open(tmp_path/'log', 'w') as log:
        process = subprocess.Popen([sys.executable, '-W', 'ignore', *words], cwd=tmp_path, stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS='1'))
        while not (tmp_path/'RUN/history.csv').exists():
            assert process.poll() is None, (tmp_path/'log').read_text()
            time.sleep(0.02)
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        os.kill(int(random.choice(children)), signal.SIGKILL)
        assert process.wait(500) == 0, (tmp_path/'log').read_text()
    assert 'going on after epoch 1 of 2' in (tmp_path/'log').read_text()
    assert same_bytes(runs/'two', tmp_path/'RUN', 'model.safetensors', 'model_ema.safetensors')


def test_a_restarted_process_never_reads_the_address_of_a_dead_one(monkeypatch):
    "torchrun keeps one store over all attempts: what one attempt wrote is invisible to the next."
    kept = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    for name, value in dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=kept.port, RANK=0, WORLD_SIZE=2, TORCHELASTIC_USE_AGENT_STORE=True).items():
        monkeypatch.setenv(name, str(value))
    for attempt in '012':
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', attempt)
        store = attempt_store(timedelta(seconds=10))
        assert not store.check(['address'])
        store.set('address', attempt)
        assert store.get('address') == attempt.encode()


def test_processes_share_the_images_without_overlap():
    whole = digits_dls(batch_size=48)
    for world in (2, 3):
        shares = [digits_dls(batch_size=48, rank=rank, world=world) for rank in range(world)]
        for which in (0, 1):
            seen = [number for share in shares for number in share[which].draws()[1].tolist()]
            assert sorted(seen) == sorted(whole[which].draws()[1].tolist())
        steps = zip(*(share.train for share in shares))
        for parts, (x, _) in zip(steps, whole.train):
            together = torch.cat([part for part, _ in parts])
            rows = lambda images: sorted(map(tuple, images.flatten(1).tolist()))
            assert rows(together) == rows(x), "a step's images are those of one process"


def test_validation_counts_each_image_once(tree, tmp_path):
    "20 images on 3 processes: nobody pads."
    save_weights(tmp_path/'model.safetensors', recipe_model(TINY), TINY)
    arguments = dict(checkpoint=str(tmp_path/'model.safetensors'), data=str(tree), batch_size='12')
    vdc_eval(**arguments, json=str(tmp_path/'one.json'))
    options = [word for name, value in arguments.items() for word in (f'--{name}', value)]
    code, _, errors = run(tmp_path, *options, '--json', tmp_path/'three.json', processes=3, command='vdc_eval')
    assert code == 0, errors
    one, three = (json.loads((tmp_path/f'{name}.json').read_text())[0] for name in ('one', 'three'))
    assert one['images'] == three['images'] == 20
    assert (three['top1'], three['top5']) == (one['top1'], one['top5'])
    assert three['loss'] == pytest.approx(one['loss'], rel=1e-5)


@pytest.fixture
def shards(tree, tmp_path):
    "Four WebDataset shards a split."
    pytest.importorskip('webdataset', reason='reading shards needs the webdataset package')
    splits = {}
    for split in ('train', 'validation'):
        files = sorted((tree/split).glob('*/*'), key=lambda file: (file.name, file.parent.name))
        for shard in range(4):
            with tarfile.open(tmp_path/f'{split}-{shard}.tar', 'w') as tar:
                for i, file in enumerate(files[shard::4]):
                    label = tarfile.TarInfo(f'{i:04}.cls')
                    label.size = 1
                    tar.add(file, f'{i:04}.jpg')
                    tar.addfile(label, io.BytesIO(file.parent.name[-1:].encode()))
        splits[split] = dict(name=split, num_samples=len(files), filenames=[f'{split}-{i}.tar' for i in range(4)], shard_lengths=[len(files[i::4]) for i in range(4)])
    (tmp_path/'_info.json').write_text(json.dumps(dict(splits=splits)))
    return tmp_path


def test_two_processes_train_from_streaming_shards_and_resume(shards):
    TINY.replace(repeated_aug=0, workers=1, ema=False).save(shards/'recipe.json')
    code, out, errors = run(shards, '--data', shards, '--reader', 'wds', '--recipe', 'recipe.json', '--out', 'RUN', processes=2)
    assert code == 0 and '96 training images, 20 held-out images, 4 classes' in out, errors
    rows = rows_of(shards/'RUN')
    assert [row['skipped_images'] for row in rows] == ['0', '0'] and out.count('finished') == 1, 'one process speaks'
    vdc_eval(checkpoint=str(shards/'RUN/model.safetensors'), data=str(shards), reader='wds', json=str(shards/'one.json'))
    (one,) = json.loads((shards/'one.json').read_text())
    assert one['images'] == 20 and one['top1'] == pytest.approx(float(rows[-1]['accuracy'])) and one['loss'] == pytest.approx(float(rows[-1]['valid_loss']), rel=1e-4)
    code, out, errors = run(shards, '--resume', 'RUN', processes=2)
    assert code == 0 and 'going on after epoch 2 of 2' in out, errors
    code, _, errors = run(shards, '--checkpoint', 'RUN/last.ckpt', '--json', 'two.json', processes=2, command='vdc_eval')
    assert code == 0, errors
    (two,) = json.loads((shards/'two.json').read_text())
    assert (two['images'], two['top1']) == (one['images'], one['top1']), 'two processes count all images, each once'


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match='batch_size=16 does not split over 3 processes'): recipe_dls(RECIPES['digits'].replace(batch_size=16), world=3)
