"Fashion-MNIST: where it is found, what is checked, how it is drawn."
import gzip
import shutil
import struct
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_help import same

from vitdynconv.data import fashion_dls, find_fashion
from vitdynconv.data import fashion as module
from vitdynconv.data.fashion import CLASSES, DEBIAN, FILES, fit_pixels
from vitdynconv.data.tensors import cut_windows


def idx(numbers):
    "An IDX file, gzipped, written by hand."
    numbers = np.asarray(numbers, dtype=np.uint8)
    header = bytes([0, 0, 8, numbers.ndim]) + b''.join(struct.pack('>I', n) for n in numbers.shape)
    return gzip.compress(header + numbers.tobytes(), compresslevel=1)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Files of the right sizes: image number i shows its label in its first pixel, its number in the next two."
    folder = tmp_path_factory.mktemp('fashion')
    for (images, labels), n in zip(FILES.values(), (60_000, 10_000)):
        pixels, names = np.zeros((n, 28, 28), np.uint8), np.arange(n) % 10
        pixels[:, 10, 10], pixels[:, 10, 11], pixels[:, 10, 12] = names, np.arange(n) // 256, np.arange(n) % 256
        (folder / f'{images}.gz').write_bytes(idx(pixels))
        (folder / f'{labels}.gz').write_bytes(idx(names))
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    "A machine without the package, the cache and the network."
    def refuse(*args, **kwargs): raise RuntimeError('Error downloading train-images-idx3-ubyte.gz:\nno network')
    monkeypatch.setattr(module, 'DEBIAN', tmp_path / 'not installed')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(module, 'download', refuse)


def steps(loader, epoch, count=3):
    loader.set_epoch(epoch)
    return [batch for batch, _ in zip(loader, range(count))]


def test_the_named_folder_comes_first_in_each_layout(made, tmp_path, nowhere):
    raw = tmp_path / 'FashionMNIST' / 'raw'
    shutil.copytree(made, raw)
    assert find_fashion(made)['test'][0].parent == made
    assert find_fashion(tmp_path)['train'][1].parent == raw, "torchvision's layout"
    for file in raw.iterdir():
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert find_fashion(tmp_path)['train'][0].name == 'train-images-idx3-ubyte', 'unpacked'
    assert same(steps(fashion_dls(tmp_path).train, 1), steps(fashion_dls(made).train, 1))


def test_nothing_found_is_one_line_with_both_ways(tmp_path, nowhere):
    with pytest.raises(ValueError) as error: fashion_dls(tmp_path)
    for part in (str(tmp_path), 'apt-get install dataset-fashion-mnist', '.gz files', 'Error downloading'): assert part in str(error.value)
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='fetch=False'): fashion_dls(tmp_path, fetch=False)


def test_what_is_downloaded_is_complete_or_absent(made, tmp_path, monkeypatch):
    import torchvision.datasets
    def half(root, download):
        folder = root_of(root)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        raise OSError(28, 'No space left on device')
    def root_of(root):
        folder = module.Path(root) / 'FashionMNIST' / 'raw'
        folder.mkdir(parents=True)
        return folder
    monkeypatch.setattr(module, 'DEBIAN', tmp_path / 'not installed')
    monkeypatch.setattr(torchvision.datasets, 'FashionMNIST', half)
    with pytest.raises(ValueError, match='No space left'): find_fashion(tmp_path)
    assert not [file for file in tmp_path.rglob('*') if file.is_file()]
    monkeypatch.setattr(torchvision.datasets, 'FashionMNIST', lambda root, download: shutil.copytree(made, root_of(root), dirs_exist_ok=True))
    assert find_fashion(tmp_path) == find_fashion(tmp_path, fetch=False)


@pytest.mark.parametrize('name, change, words', [
    ('train-images-idx3-ubyte', lambda b: b[:1000], 'cannot be read'),
    ('train-images-idx3-ubyte', lambda b: b'not gzip', 'cannot be read'),
    ('t10k-images-idx3-ubyte', lambda b: gzip.compress(gzip.decompress(b)[:-5], 1), '7839995 bytes, not 10000 x 28 x 28'),
    ('t10k-images-idx3-ubyte', lambda b: gzip.compress(bytes(4) + gzip.decompress(b)[4:], 1), 'does not begin as an IDX file'),
    ('t10k-images-idx3-ubyte', lambda b: idx(np.zeros((10, 28, 28))), 'does not begin as an IDX file'),
    ('t10k-labels-idx1-ubyte', lambda b: idx(np.arange(10_000) % 11), 'labels of each of ten classes'),
    ('t10k-labels-idx1-ubyte', lambda b: idx((np.arange(10_000) > 99) + 0), 'digit MNIST')])
def test_a_damaged_file_is_one_line_that_names_it(made, tmp_path, name, change, words):
    folder = shutil.copytree(made, tmp_path / 'damaged')
    file = folder / f'{name}.gz'
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=words) as error: fashion_dls(folder)
    assert str(file) in str(error.value) and '\n' not in str(error.value)


def test_images_and_labels_stay_together(made):
    for changes in (dict(), dict(held_out='tune'), dict(rank=1, world=2), dict(size=32), dict(size=24), dict(channels=3)):
        dls = fashion_dls(made, shift=0, flip=0, **changes)
        for loader in dls.loaders:
            for x, y in steps(loader, 2):
                pixels = loader.dataset.normalize(torch.zeros(1, x.shape[1], 1, 1)), 10 + (x.shape[-1] - 28) // 2
                first = (x[:, 0, pixels[1], pixels[1]] - pixels[0][0, 0, 0, 0]) * 0.353 * 255
                assert torch.equal(first.round().long(), y)


def test_what_tunes_is_never_what_is_reported(made):
    "Each training image says its number; the test images are not read at all where tuning is asked for."
    def numbers(data):
        pixels = data.pixels[:, 0].int()
        return set((pixels[:, 10, 11] * 256 + pixels[:, 10, 12]).tolist())
    tune, test = fashion_dls(made, held_out='tune'), fashion_dls(made)
    fit, judged = numbers(tune.train_ds), numbers(tune.valid_ds)
    assert len(fit) == 50_000 and len(judged) == 10_000 and not fit & judged
    assert tune.valid_ds.labels.bincount().tolist() == [1000] * 10
    assert numbers(test.train_ds) == fit | judged and numbers(test.valid_ds) == set(range(10_000))
    assert numbers(fashion_dls(made, held_out='tune', seed=5).valid_ds) == judged, 'the split has a seed of its own'
    assert numbers(fashion_dls(made, held_out='tune', split_seed=5).valid_ds) != judged


def test_the_epoch_is_decided_by_seed_and_number(made):
    assert same(steps(fashion_dls(made).train, 2), steps(fashion_dls(made).train, 2))
    assert not same(steps(fashion_dls(made).train, 2), steps(fashion_dls(made, seed=1).train, 2))
    for world in (2, 4):
        parts = [steps(fashion_dls(made, rank=rank, world=world).train, 2) for rank in range(world)]
        for (x, y), *shares in zip(steps(fashion_dls(made).train, 2), *parts):
            for rank, (x2, y2) in enumerate(shares): assert torch.equal(x[rank::world], x2) and torch.equal(y[rank::world], y2)


def test_augmentation_moves_and_mirrors_training_images_only(made):
    dls = fashion_dls(made, shift=2, flip=0.5)
    x = torch.cat([x for x, _ in steps(dls.train, 0, 40)])
    shown = x > dls.train_ds.normalize(torch.zeros(1, 1, 1, 1))  # up to three pixels of each image, around (10, 11)
    rows = shown.any(3)[:, 0].float().argmax(1)[shown.any(3).any(2)[:, 0]]
    assert rows.min() == 8 and rows.max() == 12
    assert 0.5 < (rows == 10).float().mean() < 0.7, 'half stay, and a fifth of the rest does'
    columns = shown.any(2)[:, 0].float().argmax(1)
    assert 0.4 < (columns > 13).float().mean() < 0.6, 'half are mirrored'
    assert torch.equal(next(iter(dls.valid))[0], dls.valid_ds.images[:128])


def test_sizes_crop_pad_and_resize(made):
    whole = fashion_dls(made).valid_ds.images[:5]
    assert torch.equal(fashion_dls(made, size=24).valid_ds.images[:5], whole[..., 2:26, 2:26])
    black = -module.MEAN / module.STD
    assert torch.allclose(fashion_dls(made, size=32).valid_ds.images[:5], F.pad(whole, (2,) * 4, value=black), atol=1e-6)
    resized = fashion_dls(made, size=14, resize=True).valid_ds
    assert resized.pixels.shape == (10_000, 1, 14, 14) and resized.pixels.dtype == torch.uint8
    assert torch.equal(fit_pixels(torch.full((2, 1, 28, 28), 77, dtype=torch.uint8), 32), torch.full((2, 1, 32, 32), 77, dtype=torch.uint8))
    three = fashion_dls(made, channels=3).valid_ds.images[:5]
    assert torch.equal(three[:, 0], three[:, 2]) and torch.equal(three[:, :1], whole)


@pytest.mark.parametrize('fill, left', [('zeros', [0, 0, 1, 2]), ('edge', [1, 1, 1, 2]), ('reflect', [3, 2, 1, 2])])
def test_what_a_move_uncovers(fill, left):
    "A ramp, moved two pixels to the right."
    ramp = torch.arange(1, 7, dtype=torch.uint8).expand(1, 1, 6, 6)
    moved = cut_windows(ramp, torch.tensor([0]), torch.tensor([[0, 2]]), torch.tensor([False]), 6, fill)
    assert moved[0, 0, 0, :4].tolist() == left and moved.dtype == torch.uint8
    padded = cut_windows(ramp, torch.tensor([0]), torch.tensor([[0, 0]]), torch.tensor([False]), 10, 'zeros')
    assert torch.equal(padded, F.pad(ramp, (2,) * 4))


def test_the_interface_is_that_of_the_digits(made):
    dls = fashion_dls(made, per_class=64, batch_size=32)
    assert list(dls.vocab) == CLASSES and dls.c == 10 and len(dls.train.dataset) == 640
    assert dls.train.one_batch()[0].shape == (32, 1, 28, 28) and len(dls.train.new(bs=64)) == 10
    assert len(dls.new_empty().train.dataset) == 0
    for bad in (dict(size=4), dict(channels=2), dict(held_out='valid'), dict(per_class=0), dict(batch_size=31, world=2, rank=0),
                dict(flip=2), dict(shift=-1), dict(held_out='tune', valid_pct=1)):
        with pytest.raises(ValueError) as error: fashion_dls(made, **bad)
        assert '\n' not in str(error.value)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason='needs the package dataset-fashion-mnist')
def test_the_real_data_and_their_speed():
    dls = fashion_dls(fetch=False)
    pixels = dls.train_ds.pixels / 255
    assert abs(pixels.mean() - dls.train_ds.mean[0]) < 5e-4 and abs(pixels.std() - dls.train_ds.std[0]) < 5e-4
    began = time.process_time()
    seen = sum(len(y) for _, y in steps(dls.train, 0, 100))
    assert seen / (time.process_time() - began) > 5_000
