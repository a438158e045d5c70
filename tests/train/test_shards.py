"What timm reads: archives, parquet files, shards."
import json
import shutil
import tarfile
import warnings

import numpy as np
import pytest
import torch

warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)
from data_help import epoch, same, tar_of, tree_dls

from vitdynconv.data import imagenet_dls
from vitdynconv.data.shards import devkit_labels


# --- what timm reads


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




def write_many(root, shards, per_shard):
    "Many shards, each image of which says its number in its pixels."
    from io import BytesIO
    from PIL import Image
    info = {}
    for split, first in (('train', 0), ('validation', 2**15)):
        names = []
        for shard in range(shards):
            names.append(f'{split}-{shard:04d}.tar')
            with tarfile.open(root / names[-1], 'w') as tar:
                for i in range(per_shard):
                    number, file = first + shard * per_shard + i, BytesIO()
                    Image.new('RGB', (8, 8), (number // 256, number % 256, 0)).save(file, 'png')
                    for ending, content in (('png', file.getvalue()), ('cls', str(number % 10).encode())):
                        member = tarfile.TarInfo(f'{i:04d}.{ending}')
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
        info[split] = dict(name=split, filenames=names, shard_lengths=[per_shard] * shards, num_samples=shards * per_shard)
    (root / '_info.json').write_text(json.dumps(dict(splits=info)))
    return root


def numbers_of(batches):
    "The numbers in the pixels of a stream that is not normalized."
    pixels = torch.cat([x for x, _ in batches]).mul(255).round().long()[:, :, 4, 4]
    return pixels[:, 0] * 256 + pixels[:, 1], torch.cat([y for _, y in batches])


def test_a_thousand_shards_for_four_processes(tmp_path):
    "Each held-out image comes once, processes train on disjoint shards, and an epoch is its number."
    root = write_many(tmp_path, 1000, 2)
    settings = dict(input_size=8, batch_size=40, workers=2, world=4, rand_augment='', mean=(0,) * 3, std=(1,) * 3, random_erasing=0, crop_pct=1.)
    held, trained, steps = [], [], set()
    for rank in range(4):
        dls = shard_dls(root, rank=rank, **settings)
        numbers, labels = numbers_of(list(dls.valid))
        assert torch.equal(numbers % 10, labels)
        assert len(numbers) == dls.valid.n_readable == 500
        held += numbers.tolist()
        epochs = [numbers_of(epoch(dls.train, number))[0] for number in (1, 2)]
        assert len(epochs[0]) == len(dls.train) * 10 and not torch.equal(*epochs)
        assert torch.equal(epochs[1], numbers_of(epoch(shard_dls(root, rank=rank, **settings).train, 2))[0])
        trained.append(set(epochs[0].tolist()))
        steps.add(len(dls.train))
    assert sorted(held) == list(range(2**15, 2**15 + 2000))
    assert len(set.union(*trained)) == sum(map(len, trained)) > 1900
    assert len(steps) == 1, 'every process makes the same number of steps'


def test_deep_and_turned_pictures_of_a_stream(tmp_path):
    "The reader hands over pictures as they are, so a stream treats them as a folder does."
    from io import BytesIO
    from PIL import ExifTags, Image
    root = write_many(tmp_path, 1, 4)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with tarfile.open(root / 'validation-0000.tar', 'w') as tar:
        for i in range(4):
            file = BytesIO()
            pixels = np.full((8, 8), 257 * 100, np.uint16)
            pixels[:4] = 0   # black above; upright: black on the right
            Image.fromarray(pixels).save(file, 'png', exif=exif)
            for ending, content in (('png', file.getvalue()), ('cls', b'3')):
                member = tarfile.TarInfo(f'{i}.{ending}')
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    dls = shard_dls(root, input_size=8, batch_size=4, workers=1, mean=(0,) * 3, std=(1,) * 3, crop_pct=1.)
    x = dls.valid.one_batch()[0][0]
    assert (x[:, :, :4] * 255).round().eq(100).all() and x[:, :, 4:].eq(0).all()
    grey = shard_dls(root, input_size=8, batch_size=4, workers=1, in_chans=1)
    assert grey.valid.one_batch()[0].shape == (4, 1, 8, 8)


def test_a_stream_knows_its_data(shards, tmp_path):
    from vitdynconv.data import data_fingerprint, fingerprint_differences
    before = data_fingerprint(shard_dls(shards))
    assert before == data_fingerprint(shard_dls(shards, rank=1, world=2)), 'whatever the number of processes'
    root = shutil.copytree(shards, tmp_path / 'shards')
    info = json.loads((root / '_info.json').read_text())
    info['splits']['train'] |= dict(filenames=info['splits']['train']['filenames'][:3], shard_lengths=[50] * 3, num_samples=150)
    (root / '_info.json').write_text(json.dumps(info))
    assert fingerprint_differences(before, data_fingerprint(shard_dls(root))) == ['the data set has 150 training images, not 200']
    root = shutil.copytree(shards, tmp_path / 'renamed')
    info = json.loads((root / '_info.json').read_text())
    names = info['splits']['train']['filenames']
    (root / names[0]).rename(root / f'other-{names[0]}')
    names[0] = f'other-{names[0]}'
    (root / '_info.json').write_text(json.dumps(info))
    assert fingerprint_differences(before, data_fingerprint(shard_dls(root))) == ['the data set has other training images, or changed ones']
