"Several processes: the same training as one, every image once, and an end with an error when one of them dies."
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import TINY, TORCHRUN, rows_of, run, same_bytes, start, tree, wait_until  # noqa: F401 (a fixture)

from vitdynconv.train.checkpoint import save_weights
from vitdynconv.data import digits_dls
from vitdynconv.train.evaluate import vdc_eval
from vitdynconv.train.recipes import RECIPES
from vitdynconv.train.build import recipe_dls, recipe_model

# no drop path and no mixing: those are drawn by each process, and would differ from one process's
EVEN = ['--epochs', '2', '--batch_size', '64', '--set', 'lr_batch_size=64 warmup_epochs=0.5 ema=yes ema_decay=0.9 grad_accum=2']


def workers(process):
    "The training processes of a torchrun."
    return [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    code, _, errors = run(folder, *EVEN, '--out', 'one')
    assert code == 0, errors
    code, _, errors = run(folder, *EVEN, '--out', 'two', processes=2)
    assert code == 0, errors
    return folder


def test_two_processes_have_the_curve_of_one(runs):
    one, two = rows_of(runs/'one'), rows_of(runs/'two')
    for name in ('train_loss', 'valid_loss', 'lr', 'gradient_norm'):
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], rel=1e-4), name
    for name in ('accuracy', 'ema_accuracy'): assert [row[name] for row in two] == [row[name] for row in one]


@pytest.mark.parametrize('file', ['model.safetensors', 'model_ema.safetensors'])
def test_two_processes_have_the_weights_of_one(runs, file):
    "Within float32 rounding. Softmax does not see the keys' bias: its gradient is nothing but rounding, which Adam makes a step of."
    one, two = load_file(runs/'one'/file), load_file(runs/'two'/file)
    for name, weight in one.items():
        difference = (weight - two[name]).abs()
        if name.endswith('qkv.bias'): difference = difference.view(3, -1)[[0, 2]]
        assert float(difference.max()) < 2e-5, name
    assert max(float((one[name] - weight).abs().max()) for name, weight in recipe_model(RECIPES['digits']).state_dict().items()) > 0.01, 'nothing was trained'


def test_a_dead_process_ends_the_run_and_the_resumed_one_has_the_same_bits(runs):
    process = start(runs, *EVEN, '--out', 'dead', processes=2)
    wait_until((runs/'dead/history.csv').exists, process)        # it is written after the first checkpoint
    os.kill(workers(process)[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0, 'a run that lost a process is no success'
    assert not (runs/'dead/model.safetensors').exists()
    code, out, errors = run(runs, '--resume', 'dead', processes=2)
    assert code == 0 and 'going on after epoch 1 of 2' in out, errors
    assert same_bytes(runs/'two', runs/'dead', 'model.safetensors', 'model_ema.safetensors')


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
    subprocess.run([sys.executable, '-W', 'ignore', *TORCHRUN, '3', '-m', 'vitdynconv.train.evaluate', *options, '--json', str(tmp_path/'three.json')],
                   check=True, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
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
    subprocess.run([sys.executable, '-W', 'ignore', *TORCHRUN, '2', '-m', 'vitdynconv.train.evaluate', '--checkpoint', 'RUN/last.ckpt', '--json', 'two.json'],
                   cwd=shards, check=True, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    (two,) = json.loads((shards/'two.json').read_text())
    assert (two['images'], two['top1']) == (one['images'], one['top1']), 'two processes count all images, each once'


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match='batch_size=16 does not split over 3 processes'): recipe_dls(RECIPES['digits'].replace(batch_size=16), world=3)
