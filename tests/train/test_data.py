"""Data as a user has it: readers, processes, workers, resume, faults, and fastai on top."""
import json
import pickle
import random
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)
import fastai.callback.progress
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from timm.models.vision_transformer import VisionTransformer

from vitdynconv.data import cluttered_digits_dls, digits_dls, imagenet_dls, preflight, write_imagefolder
from vitdynconv.data.images import image_transforms
from vitdynconv.data.imagenet import own_device
from vitdynconv.data.shards import devkit_labels
from vitdynconv.data.tensors import TensorLoader
from vitdynconv.train.recipes import RECIPES


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "Cluttered digits as JPEG files: 20 a class and split."
    return write_imagefolder(cluttered_digits_dls(size=48, copies=1), tmp_path_factory.mktemp('images') / 'digits', per_class=20)


def tree_dls(root, **changes):
    return imagenet_dls(root, **dict(dict(batch_size=20, input_size=32, workers=0, num_classes=10), **changes))


def epoch(loader, number=0):
    loader.set_epoch(number)
    return list(loader)


def same(a, b):
    return len(a) == len(b) and all(all(map(torch.equal, x, y)) for x, y in zip(a, b))


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_vocab_and_items_are_documented(tree):
    dls = tree_dls(tree)
    for loader in (digits_dls().train, dls.train):
        assert list(loader.vocab) == [str(i) for i in range(10)] and loader.items == list(range(len(loader.dataset)))
        for name in ('vocab', 'items'): assert getattr(type(loader), name).__doc__


# --- the sequence of draws


@pytest.mark.parametrize('make', [digits_dls, cluttered_digits_dls])
def test_held_digits_are_a_function_of_seed_and_epoch(make):
    dls, again = make(batch_size=64), make(batch_size=64)
    assert same(epoch(dls.train, 2), epoch(again.train, 2))
    assert not same(epoch(dls.train, 2), epoch(dls.train, 3))
    assert not same(epoch(dls.train, 2), epoch(make(batch_size=64, seed=1).train, 2))
    assert same(list(dls.valid), list(make(batch_size=64, seed=1).valid)), 'the split has a seed of its own'


def test_a_pass_goes_on_to_the_next_epoch_unless_told_otherwise():
    dls = digits_dls()
    first, second = list(dls.train), list(dls.train)
    assert not same(first, second) and same(second, epoch(dls.train, 1))
    assert torch.equal(dls.train.one_batch()[0], epoch(dls.train.new(), dls.train.epoch)[0][0])


@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('changes', [{}, dict(repeated_aug=3)])
def test_processes_share_every_step(tree, world, changes):
    one = epoch(tree_dls(tree, **changes).train, 1)
    many = [epoch(tree_dls(tree, rank=rank, world=world, **changes).train, 1) for rank in range(world)]
    assert len({len(part) for part in many}) == 1
    for (x, y), *parts in zip(one, *many):
        for rank, part in enumerate(parts): assert torch.equal(part[0], x[rank::world]) and torch.equal(part[1], y[rank::world])


@pytest.mark.parametrize('world', [2, 3, 7])
def test_each_validation_image_counts_once(tree, world):
    dls = [tree_dls(tree, batch_size=world, rank=rank, world=world) for rank in range(world)]
    seen = torch.cat([part.valid.draws()[1] for part in dls])
    assert sorted(seen.tolist()) == list(range(200))
    assert sum(len(y) for part in dls for _, y in part.valid) == 200


def test_torchrun_decides_the_share_before_any_process_group(tree, monkeypatch):
    for name, value in dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1').items(): monkeypatch.setenv(name, value)
    for dls in (tree_dls(tree), digits_dls(), cluttered_digits_dls(copies=1)):
        assert [(loader.rank, loader.world) for loader in dls.loaders] == [(1, 2)] * 2 and dls.train.bs == (10 if dls.train.bs == 10 else 16)
    assert (digits_dls(rank=0, world=1).train.rank, digits_dls(rank=0, world=1).train.world) == (0, 1)
    monkeypatch.setattr('vitdynconv.data.imagenet.default_device', lambda: torch.device('cuda', 0))
    assert own_device() == torch.device('cuda', 1), 'each process has its own GPU'
    with pytest.raises(ValueError, match='rank=2 is not one of 2 processes'): digits_dls(rank=2, world=2)


def test_training_reads_each_image_once_an_epoch_without_overlap(tree):
    parts = [tree_dls(tree, rank=rank, world=2).train for rank in range(2)]
    seen = torch.cat([part.draws()[1] for part in parts])
    assert sorted(seen.tolist()) == list(range(200))


def test_workers_change_nothing(tree):
    alone = epoch(tree_dls(tree, repeated_aug=3).train, 4)
    for workers in (1, 2): assert same(alone, epoch(tree_dls(tree, repeated_aug=3, workers=workers).train, 4))


def test_loading_leaves_the_callers_random_numbers_alone(tree):
    loaders = [tree_dls(tree).train, tree_dls(tree, workers=1).train, digits_dls().train]
    torch.manual_seed(3)
    before = states()
    for loader in loaders: epoch(loader)
    assert states() == before
    torch.manual_seed(4)  # and does not depend on them
    assert same(epoch(loaders[0], 5), epoch(tree_dls(tree).train, 5))


def test_a_broken_off_pass_disturbs_nothing(tree):
    loader = tree_dls(tree, workers=2).train
    whole = epoch(loader, 2)
    loader.set_epoch(2)
    for _, batch in zip(range(2), loader): assert len(batch[0]) == 20
    assert loader.epoch == 2 and same(whole, list(loader)) and loader.epoch == 3


# --- Table 4 in effect


def test_repeated_augmentation_gives_each_process_another_copy(tree):
    parts = [tree_dls(tree, batch_size=30, repeated_aug=3, rank=rank, world=3).train for rank in range(3)]
    a, b, c = (part.draws()[1] for part in parts)
    assert torch.equal(a, b) and torch.equal(b, c) and len(a) == len(a.unique()) == 60
    for (x, _), (y, _), (z, _) in zip(*map(epoch, parts)):
        assert not (torch.equal(x, y) or torch.equal(y, z)) and (x - y).flatten(1).abs().amax(1).min() > 0


def test_random_erasing_only_adds_boxes_of_noise(tree):
    plain, erased = (torch.cat([x for x, _ in epoch(tree_dls(tree, random_erasing=share).train)]) for share in (0, .25))
    changed = (plain != erased).any(1)
    boxes = changed.flatten(1).any(1)
    assert 0.15 < boxes.float().mean() < 0.35
    for box in changed[boxes]: assert box.sum() >= 0.98 * box.any(0).sum() * box.any(1).sum()
    noise = erased.transpose(0, 1)[:, changed]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_rand_augment_and_bicubic_reach_the_pixels(tree):
    base = dict(random_erasing=0, rand_augment='')
    plain = torch.cat([x for x, _ in epoch(tree_dls(tree, **base).train)])
    for change, least in ((dict(rand_augment='rand-m9-mstd0.5-inc1'), 0.5), (dict(interpolation='bilinear'), 0.9)):
        other = torch.cat([x for x, _ in epoch(tree_dls(tree, **dict(base, **change)).train)])
        assert (plain != other).flatten(1).any(1).float().mean() > least, change


def test_the_strongest_posterizing_is_survived():
    picture = Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3))
    train, _ = image_transforms(dict(input_size=32))
    for op in (op for step in train.transforms for op in getattr(step, 'ops', ())):
        op.prob, op.magnitude, op.magnitude_std = 1, 10, 0
        assert op(picture).size == (32, 32), op.name


def test_a_recipe_sets_the_loaders(tree):
    recipe = RECIPES['deit_s'].override('batch_size=40 grad_accum=2 img_size=32 num_classes=10 workers=0 seed=7')
    dls = imagenet_dls(tree, recipe=recipe)
    assert (dls.train.bs, dls.train.seed, dls.train.repeats, dls.train.random_erasing, dls.train.input_size) == (20, 7, 3, 0.25, 32)
    assert imagenet_dls(tree, recipe=recipe, seed=8).train.seed == 8
    assert dls.train.one_batch()[0].shape == (20, 3, 32, 32)


# --- faults


def test_unreadable_images_are_skipped_counted_and_named(tree, tmp_path, caplog):
    root = tmp_path / 'broken'
    shutil.copytree(tree, root)
    names = {}
    for split in ('train', 'validation'):
        files = sorted((root / split / '3').iterdir())[:4]
        files[0].write_bytes(files[0].read_bytes()[:200])
        files[1].write_bytes(b'')
        files[2].unlink()
        files[2].mkdir()  # a folder with the name of an image is no image
        files[3].write_bytes(bytes(range(256)) * 4)
        names[split] = [f'3/{files[i].name}' for i in (0, 1, 3)]
    for workers in (0, 2):
        dls = tree_dls(root, workers=workers, batch_size=10)
        assert all(len(y) == 10 for _, y in epoch(dls.train)) and sum(len(y) for _, y in epoch(dls.valid)) == 196
        assert dls.train.skipped == names['train'] and dls.valid.skipped == names['validation']
        assert len(dls.valid.items) == 196
    assert same(epoch(tree_dls(root, workers=0).train, 3), epoch(tree_dls(root, workers=2).train, 3))


def test_nothing_readable_is_an_error(tree, tmp_path):
    root = tmp_path / 'broken'
    shutil.copytree(tree, root)
    for file in root.glob('train/*/*'): file.write_bytes(b'')
    with pytest.raises(ValueError, match='none of the first ten images of the training split'): tree_dls(root)


def test_all_problems_come_in_one_error(tree, tmp_path):
    root = tmp_path / 'wrong'
    shutil.copytree(tree, root)
    shutil.rmtree(root / 'validation' / '7')
    for split in ('train', 'validation'): shutil.rmtree(root / split / '4'); (root / split / '4').mkdir()
    with pytest.raises(ValueError) as error: tree_dls(root, num_classes=1000)
    for part in ('validation split lacks 1', ': 7', 'no image in 1 class folders', ': 4', '9 classes found but 1000 expected', 'num_classes=9'):
        assert part in str(error.value)


@pytest.mark.parametrize('changes, words', [
    (dict(batch_size=21, world=2, rank=0), 'batch_size=21 cannot be shared by 2 processes'),
    (dict(batch_size=400), '200 images, fewer than one step of 400'),
    (dict(colour_jitter=1), 'no setting colour_jitter'),
    (dict(train_split='nowhere'), "no 'nowhere' split"),
    (dict(valid_split='train'), 'training and validation images are both'),
    (dict(num_classes=1000), '10 classes found but 1000 expected')])
def test_mistakes_are_named_before_any_work(tree, changes, words):
    with pytest.raises(ValueError, match=words): tree_dls(tree, **changes)


def test_a_missing_split_is_not_taken_from_the_root(tree, tmp_path):
    shutil.copytree(tree / 'validation', tmp_path / 'val')
    with pytest.raises(ValueError, match="no 'train' split"): tree_dls(tmp_path)
    with pytest.raises(ValueError, match='does not exist'): tree_dls(tmp_path / 'missing')


def test_preflight_compares_the_model(tree):
    dls = tree_dls(tree)
    assert preflight(dls, nn.Linear(2, 2)) == '200 training images, 200 held-out images, 10 classes'
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=1, num_classes=1000)
    with pytest.raises(ValueError, match='the model has 1000 classes but the data have 10'): preflight(dls, model)


def test_sizes_of_digits_are_checked():
    for bad in (dict(batch_size=31, world=2), dict(valid_pct=1.)):
        with pytest.raises(ValueError): digits_dls(**bad)
    for bad in (dict(size=16), dict(channels=2), dict(copies=0)):
        with pytest.raises(ValueError): cluttered_digits_dls(**bad)
    with pytest.raises(ValueError, match='fewer than one step'): digits_dls(batch_size=2000).train.one_batch()


def test_a_tree_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    saved = Image.Image.save
    def full_disk(self, *args, **kwargs):
        if '00100' in str(args[0]): raise OSError(28, 'No space left on device')
        return saved(self, *args, **kwargs)
    monkeypatch.setattr(Image.Image, 'save', full_disk)
    with pytest.raises(OSError): write_imagefolder(digits_dls(), tmp_path / 'digits')
    assert not list(tmp_path.iterdir())


# --- what timm reads


def tar_of(files, to):
    to.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(to, 'w') as tar:
        for name, path in files.items(): tar.add(path, name)
    return to


def flat_names(tree, split):
    return {f'{file.parent.name}_{file.name}': file for file in sorted((tree / split).glob('*/*'))}


@pytest.mark.parametrize('workers', [0, 2])
def test_tars_give_what_the_tree_gives(tree, tmp_path, workers):
    for split, archive in (('train', 'ILSVRC2012_img_train'), ('validation', 'ILSVRC2012_img_val')):
        tars = {}
        for folder in sorted((tree / split).iterdir()):
            files = {name: file for name, file in flat_names(tree, split).items() if file.parent == folder}
            tars[f'{folder.name}.tar'] = tar_of(files, tmp_path / 'tars' / split / f'{folder.name}.tar')
        tar_of(tars, tmp_path / 'archives' / f'{archive}.tar')
    expected = [epoch(loader, 1) for loader in tree_dls(tree).loaders]
    for root in (tmp_path / 'tars', tmp_path / 'archives'):
        dls = tree_dls(root, workers=workers)
        dls.train.one_batch()  # opens the archives here; workers must open their own
        for loader, batches in zip(dls.loaders, expected): assert same(epoch(loader, 1), batches), root


def make_devkit(names, truth, to):
    "A development kit as ILSVRC2012 ships it: synsets, two of them inner nodes, and one number a validation image."
    from scipy.io import savemat
    kind = [('ILSVRC2012_ID', 'f8'), ('WNID', 'O'), ('words', 'O'), ('gloss', 'O'), ('num_children', 'f8')]
    rows = [(i + 1, name, name, '', 0) for i, name in enumerate(names)] + [(90, 'animal', '', '', 2), (91, 'thing', '', '', 8)]
    savemat(to / 'meta.mat', dict(synsets=np.array(rows, dtype=kind)))
    (to / 'truth.txt').write_text(''.join(f'{number}\n' for number in truth))
    with tarfile.open(to / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz') as tar:
        tar.add(to / 'meta.mat', 'ILSVRC2012_devkit_t12/data/meta.mat')
        tar.add(to / 'truth.txt', 'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt')


@pytest.mark.parametrize('unpacked', [False, True])
def test_the_flat_validation_archive_is_labelled_by_the_devkit(tree, tmp_path, unpacked):
    shutil.copytree(tree / 'train', tmp_path / 'train')
    files = sorted((tree / 'validation').glob('*/*'), key=lambda file: file.name)  # classes in a jumble
    numbered = {f'ILSVRC2012_val_{i:08d}.JPEG': file for i, file in enumerate(files, 1)}
    if unpacked:
        (tmp_path / 'val').mkdir()
        for name, file in numbered.items(): shutil.copy(file, tmp_path / 'val' / name)
    else: tar_of(numbered, tmp_path / 'ILSVRC2012_img_val.tar')
    with pytest.raises(ValueError, match='lie in no class folders'): tree_dls(tmp_path)
    names = list('7035912468')  # the kit's own order of classes
    make_devkit(names, [names.index(file.parent.name) + 1 for file in files], tmp_path)
    assert devkit_labels(tmp_path / 'ILSVRC2012_devkit_t12.tar.gz') == [file.parent.name for file in files]
    labels = torch.cat([y for _, y in tree_dls(tmp_path).valid])
    assert [str(label) for label in labels.tolist()] == [file.parent.name for file in files]
    make_devkit(names, [1, 2], tmp_path)
    with pytest.raises(ValueError, match='200 validation images but 2 labels'): tree_dls(tmp_path)


def test_torchvision_data_sets_are_readers_too(tree):
    dls = [imagenet_dls(tree, reader, batch_size=20, input_size=32, workers=0, num_classes=10) for reader in ('', 'torch/folder')]
    for a, b in zip(*(part.loaders for part in dls)): assert same(epoch(a), epoch(b))


def write_parquet(datasets, tree, folder):
    "One parquet file a split. Splits are read from names, so no 'test' may stand in the path."
    datasets.disable_progress_bars()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    for split in ('train', 'validation'):
        files = sorted((tree / split).glob('*/*'))
        rows = dict(image=[str(file) for file in files], label=[int(file.parent.name) for file in files])
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f'{split}-00000-of-00001.parquet')
    return folder


def test_parquet(tree, tmp_path_factory):
    datasets = pytest.importorskip('datasets', reason='reading parquet needs the datasets package')
    folder = write_parquet(datasets, tree, tmp_path_factory.mktemp('parquet'))
    dls = tree_dls(folder, reader='hfds', options=dict(cache_dir=str(tmp_path_factory.mktemp('cache'))))
    expected = tree_dls(tree)
    assert same(epoch(dls.valid), epoch(expected.valid)) and same(epoch(dls.train, 2), epoch(expected.train, 2))


def test_streamed_parquet(tree, tmp_path_factory):
    datasets = pytest.importorskip('datasets', reason='reading parquet needs the datasets package')
    folder = write_parquet(datasets, tree, tmp_path_factory.mktemp('parquet'))
    options = dict(cache_dir=str(tmp_path_factory.mktemp('cache')), num_samples=200)
    dls = tree_dls(folder, reader='hfids', options=options, workers=1)
    assert sum(len(y) for _, y in dls.valid) == 200 and sum(len(y) for _, y in dls.train) == 200
    assert same(epoch(dls.train, 3), epoch(tree_dls(folder, reader='hfids', options=options, workers=1).train, 3))


# --- shards


@pytest.fixture(scope='module')
def shards(tree, tmp_path_factory):
    "Four shards a split, as the webdataset package expects them."
    root, info = tmp_path_factory.mktemp('shards'), {}
    for split in ('train', 'validation'):
        files, names = sorted((tree / split).glob('*/*'), key=lambda file: file.name), []
        for part in range(4):
            members = {}
            for i, file in enumerate(files[part::4]):
                label = root / f'{split}-{part}-{i}.cls'
                label.write_text(file.parent.name)
                members |= {f'{part}{i:04d}.jpg': file, f'{part}{i:04d}.cls': label}
            names.append(tar_of(members, root / f'{split}-{part}.tar').name)
        info[split] = dict(name=split, filenames=names, shard_lengths=[50] * 4, num_samples=200)
    (root / '_info.json').write_text(json.dumps(dict(splits=info)))
    return root


def shard_dls(root, **changes):
    pytest.importorskip('webdataset', reason='reading shards needs the webdataset package')
    return tree_dls(root, reader='wds', **changes)


def test_shards_hold_the_tree(tree, shards):
    dls, expected = shard_dls(shards, workers=2), tree_dls(tree)
    key = lambda batches: sorted((int(y), x.sum().item()) for xs, ys in batches for x, y in zip(xs, ys))
    assert np.allclose(key(epoch(dls.valid)), key(epoch(expected.valid)), atol=1e-2)
    assert len(epoch(dls.train)) == len(dls.train)


def test_a_streams_epoch_is_reproducible(shards):
    first = epoch(shard_dls(shards, workers=2).train, 3)
    loader = shard_dls(shards, workers=2).train
    assert not same(epoch(loader, 2), first) and same(epoch(loader, 3), first)


def test_shards_are_dealt_to_processes(shards):
    labels, total = [], 0
    for rank in range(2):
        dls = shard_dls(shards, workers=2, rank=rank, world=2)
        names = dls.valid.dataset.source.reader.split_info.filenames
        labels += names
        total += sum(len(y) for _, y in dls.valid)
        train = dls.train.dataset.source.reader
        assert (train.dist_rank, train.dist_num_replicas) == (rank, 2)
    assert sorted(labels) == [f'validation-{i}.tar' for i in range(4)] and total == 200


def test_streams_say_what_they_cannot_do(shards):
    for changes, words in ((dict(repeated_aug=3), 'cannot repeat'), (dict(num_classes=None), 'set num_classes'),
                           (dict(batch_size=20, world=5, rank=0), '4 training shards cannot be shared by 5'), (dict(num_classes=5), 'label of the validation stream is')):
        with pytest.raises(ValueError, match=words): shard_dls(shards, **changes)


def test_fewer_validation_shards_than_processes_is_one_line_for_every_process(shards, tmp_path):
    root = shutil.copytree(shards, tmp_path / 'shards')
    info = json.loads((root / '_info.json').read_text())
    info['splits']['validation'] |= dict(filenames=['validation-0.tar'], shard_lengths=[50], num_samples=50)
    (root / '_info.json').write_text(json.dumps(info))
    assert sum(len(y) for _, y in shard_dls(root).valid) == 50, 'enough for one process'
    for rank in range(2):
        with pytest.raises(ValueError) as error: shard_dls(root, rank=rank, world=2)
        assert str(error.value).endswith(': 1 validation shards cannot be shared by 2 processes: write more shards, or start fewer processes')


def test_unreadable_samples_of_shards_are_counted(shards, tmp_path):
    shutil.copytree(shards, tmp_path / 'shards')
    root, bad = tmp_path / 'shards', tmp_path / 'bad.jpg'
    bad.write_bytes(b'not a picture')
    label = next(root.glob('*.cls'))
    with tarfile.open(root / 'validation-2.tar', 'a') as tar:
        tar.add(bad, '29999.jpg')
        tar.add(label, '29999.cls')
    dls = shard_dls(root, workers=2)
    assert sum(len(y) for _, y in dls.valid) == 200 and len(dls.valid.skipped) == 1


# --- fastai


class Loss(nn.CrossEntropyLoss):
    def activation(self, logits): return logits.softmax(-1)
    def decodes(self, logits): return logits.argmax(-1)


def learner(dls, path=None):
    torch.manual_seed(0)
    x = dls.train.one_batch()[0]
    model = VisionTransformer(img_size=x.shape[-1], in_chans=x.shape[1], patch_size=8, embed_dim=24, depth=1, num_heads=1, num_classes=10)
    return Learner(dls, model, Loss(), metrics=accuracy, path=path)


@pytest.mark.parametrize('workers', [None, 0, 1])
def test_a_learner_is_at_home(tree, workers, tmp_path):
    dls = digits_dls(batch_size=64) if workers is None else tree_dls(tree, workers=workers)
    learn = learner(dls, tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        measured = learn.validate()[1]
        probabilities, targets, decoded = learn.get_preds(with_decoded=True)
        assert len(targets) == dls.valid.n and abs((decoded == targets).float().mean() - measured) < 1e-6
        assert torch.equal(targets, torch.cat([y for _, y in dls.valid]))
        found = ClassificationInterpretation.from_learner(learn)
        losses, worst = found.top_losses(2)
        assert found.confusion_matrix().sum() == dls.valid.n and torch.equal(found.losses[worst], losses)
        again = found[worst.tolist()]  # through `test_dl` and its labels
        assert torch.equal(again[2], targets[worst]) and torch.allclose(again[1], probabilities[worst], atol=1e-5)
        learn.show_results(max_n=3)
        found.plot_top_losses(2)
        dls.show_batch(max_n=3)
        on_train = learn.get_preds(ds_idx=0)[0]
        assert len(on_train) == len(dls.train.dataset), 'predictions leave no image out'


def test_predictions_for_files_after_export(tree, tmp_path):
    learn = learner(tree_dls(tree), tmp_path)
    file = sorted((tree / 'validation' / '5').iterdir())[3]
    with learn.no_bar():
        name, number, probabilities = learn.predict(file)
        index = learn.dls.valid.dataset.filename
        everything = learn.get_preds()[0]
        place = [index(i) for i in range(200)].index(f'5/{file.name}')
        assert torch.allclose(probabilities, everything[place], atol=1e-5) and name == str(int(number))
        assert learn.predict(Image.open(file))[0] == name
        learn.export('model.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path / 'model.pkl')
    assert len(loaded.dls.train.dataset) == 0
    with loaded.no_bar(): assert torch.allclose(loaded.predict(file)[2], probabilities, atol=1e-6)


def test_loaders_pickle_and_move(tree):
    dls = tree_dls(tree)
    loader = pickle.loads(pickle.dumps(dls.train))
    assert same(epoch(loader, 1), epoch(dls.train, 1))
    assert isinstance(dls, DataLoaders) and dls.to(torch.device('cpu')).train.device == torch.device('cpu')
    empty = dls.new_empty()
    assert len(empty.train.dataset) == 0 and list(empty.vocab) == [str(i) for i in range(10)]
    held = digits_dls()
    assert isinstance(held.train, TensorLoader) and len(held.new_empty().valid.dataset) == 0
