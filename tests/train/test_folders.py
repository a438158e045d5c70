"A folder of pictures: what is a class, what is left out, how it is split, whether it is still the same."
import json
import os
import shutil

import numpy as np
import pytest
from data_help import tar_of, tree_dls
from PIL import Image

from vitdynconv.data import data_fingerprint, digits_dls, fingerprint_differences, folder_summary, imagenet_dls, preflight
from vitdynconv.data.folders import FolderReader, find_split, is_unsplit, split_reader


@pytest.fixture
def copy(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / 'copy')


def one_line(root, words, **settings):
    "Both ways to look at a folder answer with one line that holds `words`."
    for look in (folder_summary, lambda root: imagenet_dls(root, **dict(dict(batch_size=4, input_size=32, workers=0), **settings))):
        with pytest.raises(ValueError, match=words) as error: look(root)
        assert '\n' not in str(error.value)


# --- what is a class, what is left out


@pytest.mark.parametrize('hidden', ['.git', '.cache', '.ipynb_checkpoints', '__MACOSX', '@eaDir'])
def test_hidden_folders_are_no_classes(copy, hidden):
    for split in 'train', 'validation':
        shutil.copytree(copy / split / '3', copy / split / hidden)
        shutil.copytree(copy / split / '3', copy / split / '5' / hidden)
        shutil.copy(next((copy / split / '3').iterdir()), copy / split / '4' / '._photo.jpg')
    assert folder_summary(copy).classes == list('0123456789')
    dls = tree_dls(copy)
    assert list(dls.vocab) == list('0123456789') and dls.valid.n == 200 and dls.train_ds.source.reader.targets.max() == 9


def test_hidden_entries_of_a_tar_are_no_classes(tree, tmp_path):
    for split in 'train', 'validation':
        files = {f'./{file.parent.name}/{file.name}': file for file in sorted((tree / split).glob('*/*'))}
        some = next(iter(files.values()))
        tar_of(files | {'./.cache/1.jpg': some, './3/._x.jpg': some, '__MACOSX/3/1.jpg': some}, tmp_path / f'{split}.tar')
    dls, expected = tree_dls(tmp_path), tree_dls(tree)
    assert list(dls.vocab) == list(expected.vocab) and dls.valid.n == 200
    for (x, y), (x2, y2) in zip(dls.valid, expected.valid, strict=True): assert (x == x2).all() and (y == y2).all()


def test_every_format_that_pillow_reads_is_read_and_others_are_counted(copy):
    "timm reads .png, .jpg and .jpeg and says nothing of the rest."
    file = next((copy / 'train' / '3').iterdir())
    for ending in 'bmp', 'tiff', 'webp', 'gif', 'PNG': Image.open(file).save(copy / 'train' / '3' / f'new.{ending}')
    for name in 'a.heic', 'b.HEIC', 'notes.txt', 'README': (copy / 'train' / '3' / name).touch()
    (copy / 'train' / '3' / 'gone.jpg').symlink_to('nowhere')
    shutil.copy(file, copy / 'train' / 'cover.jpg')
    summary = folder_summary(copy)
    assert summary.counts['train']['3'] == 25
    assert summary.others == {'.heic': 2, '.txt': 1, 'no ending': 1, 'broken link': 1, 'image outside of the class folders': 1}
    for words in (str(summary), preflight(tree_dls(copy))): assert 'left out: 2 x .heic, 1 x .txt' in words
    assert sum(len(y) for _, y in tree_dls(copy, batch_size=5).train) == 205


def test_a_folder_in_a_class_belongs_to_the_class(copy):
    for split in 'train', 'validation':
        (copy / split / '3').rename(copy / split / 'x')
        (copy / split / '3').mkdir()
        (copy / split / 'x').rename(copy / split / '3' / '2019')
    assert folder_summary(copy).classes == list('0123456789')


def test_links_that_lead_back_end(copy):
    (copy / 'train' / '3' / 'loop').symlink_to(copy / 'train')
    assert len(FolderReader(copy / 'train')) < 2000


def test_classes_are_numbered_as_a_person_would(copy):
    for split in 'train', 'validation': (copy / split / '3').rename(copy / split / '10')
    assert folder_summary(copy).classes == ['0', '1', '2', '4', '5', '6', '7', '8', '9', '10']
    assert list(tree_dls(copy).vocab) == folder_summary(copy).classes


# --- grey or colour


@pytest.mark.parametrize('mode, channels', [('L', 1), ('RGB', 1), ('RGB', 3), ('I;16', 1)])
def test_channels_are_those_of_the_pictures(tmp_path, mode, channels):
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (12, 16), dtype=np.uint8)
        if mode == 'I;16': picture = Image.fromarray(pixels.astype(np.uint16) * 257)
        else: picture = Image.fromarray(pixels).convert(mode)
        if channels == 3: picture.putpixel((3, 3), (255, 0, 0))
        file = tmp_path / 'ab'[number % 2] / f'{number}.png'
        file.parent.mkdir(exist_ok=True)
        picture.save(file)
    summary = folder_summary(tmp_path)
    assert (summary.channels, summary.size) == (channels, 12)
    dls = imagenet_dls(tmp_path, batch_size=2, input_size=8, workers=0, in_chans=channels)
    assert dls.train.one_batch()[0].shape == (2, channels, 8, 8) and data_fingerprint(dls) == summary.fingerprint


# --- unsplit folders


def test_an_unsplit_folder_is_split_by_a_seeded_share(tree):
    root = tree / 'train'
    names = lambda dls: [set(loader.dataset.source.reader.names) for loader in dls.loaders]
    train, valid = names(tree_dls(root))
    assert len(train) == 160 and len(valid) == 40 and not train & valid
    assert np.bincount(tree_dls(root).valid_ds.source.reader.targets).tolist() == [4] * 10
    assert names(tree_dls(root)) == [train, valid] == names(tree_dls(root, seed=7)), 'a seed of its own'
    assert names(tree_dls(root, split_seed=7))[1] != valid and len(names(tree_dls(root, valid_pct=.5))[1]) == 100
    assert tree_dls(root).split == dict(valid_pct=0.2, split_seed=42) == folder_summary(root).split
    assert '20% of each class held out (split_seed=42)' in preflight(tree_dls(root))
    parts = [tree_dls(root, rank=rank, world=2) for rank in range(2)]
    assert names(parts[0]) == names(parts[1]) == [train, valid]


def test_more_images_leave_the_split_nearly_as_it_was(tree, tmp_path):
    root = shutil.copytree(tree / 'train', tmp_path / 'grown')
    before = set(split_reader(FolderReader(root))[1].names)
    for file in list(root.glob('*/*'))[::20]: shutil.copy(file, file.with_name(f'new{file.name}'))
    train = set(split_reader(FolderReader(root))[0].names)
    assert len(before & train) <= 5


def test_a_class_may_be_called_train(tree, tmp_path):
    for name in 'car', 'plane', 'train': shutil.copytree(tree / 'train' / '3', tmp_path / name)
    assert is_unsplit(tmp_path) and folder_summary(tmp_path).classes == ['car', 'plane', 'train']
    shutil.copytree(tree / 'train', tmp_path / 'real' / 'train')
    assert not is_unsplit(tmp_path / 'real')
    one_line(tmp_path / 'real', "no 'validation' split")


def test_a_class_of_one_image_cannot_be_split(tree, tmp_path):
    shutil.copytree(tree / 'train', tmp_path, dirs_exist_ok=True)
    for file in sorted((tmp_path / '4').iterdir())[1:]: file.unlink()
    one_line(tmp_path, "class '4' has one image")


# --- what cannot be trained on


def test_a_validation_split_that_vanished_or_is_empty(copy):
    for file in copy.glob('validation/*/*'): file.unlink()
    one_line(copy, 'no image in .*validation')
    shutil.rmtree(copy / 'validation')
    (copy / 'validation').mkdir()
    one_line(copy, 'no image in .*validation')
    (copy / 'validation').rmdir()
    one_line(copy, "no 'validation' split")


def linked_split(root): (root / 'validation').symlink_to(root / 'train')
def split_linked_to_validation(root): (root / 'train').rename(root / 'validation'), (root / 'train').symlink_to(root / 'validation')
def linked_classes(root):
    (root / 'validation').mkdir()
    for folder in (root / 'train').iterdir(): (root / 'validation' / folder.name).symlink_to(folder)
def linked_files(root):
    for file in sorted(root.glob('train/*/*'))[::3]:
        (root / 'validation' / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / 'validation' / file.parent.name / f'v{file.name}').symlink_to(file)
def hard_links(root):
    for file in sorted(root.glob('train/*/*'))[::3]:
        (root / 'validation' / file.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(file, root / 'validation' / file.parent.name / f'v{file.name}')
def copied(root): shutil.copytree(root / 'train', root / 'validation')


@pytest.mark.parametrize('change', [linked_split, split_linked_to_validation, linked_classes, linked_files, hard_links, copied])
def test_held_out_images_that_are_training_images_are_refused(copy, change):
    shutil.rmtree(copy / 'validation')
    change(copy)
    one_line(copy, 'training images too|images are both')


def test_equal_names_and_sizes_alone_are_no_offence(tmp_path):
    for seed, split in enumerate(('train', 'val')):
        for label in 'ab':
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng((seed, i, ord(label))).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f'{i}.bmp')  # all of one size
    assert folder_summary(tmp_path).counts['validation'] == {'a': 4, 'b': 4}


@pytest.mark.parametrize('name, words', [
    ('x.parquet', 'hfds'), ('shard-0000.tar', 'wds'), ('data.zip', 'unpack the .zip'), ('photo.jpg', 'have no class')])
def test_other_formats_get_a_hint(tmp_path, name, words):
    (tmp_path / name).touch()
    one_line(tmp_path, words)


def test_no_folder_at_all(tmp_path):
    (tmp_path / 'file.zip').touch()
    one_line(tmp_path / 'file.zip', 'is not a folder')
    one_line(tmp_path / 'nowhere', 'does not exist')
    one_line(tmp_path, "no 'train' split")


def test_missing_and_empty_classes(copy):
    shutil.rmtree(copy / 'validation' / '7')
    (copy / 'train' / 'empty').mkdir()
    one_line(copy, 'validation split lacks 1 of the training classes: 7.*no image in 1 class folders .*: empty')


def test_text_instead_of_pictures(copy):
    for file in copy.glob('train/*/*'): file.write_text('not a picture')
    one_line(copy, 'can be read')


@pytest.mark.parametrize('reader', ['wds', 'torch/nothing', 'nonsense/x', 'tfds/none'])
def test_a_reader_that_cannot_open_is_one_line(tree, reader):
    with pytest.raises(ValueError, match='reader') as error: tree_dls(tree, reader=reader)
    assert '\n' not in str(error.value)


# --- are these the same data?


def differences(before, now):
    return fingerprint_differences(json.loads(json.dumps(before)), now)


def rename(root): [(root / split / '3').rename(root / split / 'three') for split in ('train', 'validation')]
def permute(root):
    for split in 'train', 'validation':
        for old, new in (('3', 'x'), ('8', '3'), ('5', '8'), ('x', '5')): (root / split / old).rename(root / split / new)
def remove_file(root): sorted((root / 'train' / '3').iterdir())[2].unlink()
def add_file(root): shutil.copy(sorted((root / 'train' / '3').iterdir())[2], root / 'validation' / '4' / 'new.jpg')
def change_file(root): sorted((root / 'validation' / '9').iterdir())[0].write_bytes(b'other')
def remove_class(root): [shutil.rmtree(root / split / '6') for split in ('train', 'validation')]
def add_class(root): [shutil.copytree(root / split / '6', root / split / 'new') for split in ('train', 'validation')]
def move_files(root):
    for i, file in enumerate(sorted((root / 'validation' / '2').iterdir())[:3]): file.rename(root / 'train' / '2' / f'moved{i}.jpg')


@pytest.mark.parametrize('change, words', [
    (rename, ["training images of class '3' are now those of 'three'", "held-out images of class '3' are now those of 'three'"]),
    (permute, ["training images of class '3' are now those of '5'", "held-out images of class '8' are now those of '3'", "class '5' are now those of '8'"]),
    (remove_file, ["class '3' has 19 training images, not 20"]),
    (add_file, ["class '4' has 21 held-out images, not 20"]),
    (change_file, ["class '9' has other held-out images"]),
    (remove_class, ["class '6' is gone from the training images", "class '6' is gone from the held-out images"]),
    (add_class, ["class 'new' is new in the training images"]),
    (move_files, ["class '2' has 23 training images, not 20", "class '2' has 17 held-out images, not 20"])])
def test_every_difference_has_a_name(tree, copy, change, words):
    before = folder_summary(tree).fingerprint
    assert differences(before, folder_summary(copy).fingerprint) == []
    change(copy)
    said = differences(before, folder_summary(copy).fingerprint)
    for sentence in words: assert any(sentence in each for each in said), said
    assert len(said) <= 6


def test_another_split_has_a_name(tree):
    before, now = (folder_summary(tree / 'train', split_seed=seed).fingerprint for seed in (1, 2))
    assert any('split_seed=2, not valid_pct=0.2 with split_seed=1' in each for each in differences(before, now))
    assert any('as the folders say' in each for each in differences(before, folder_summary(tree).fingerprint))


def test_loaders_of_every_kind_know_their_data(tree, tmp_path):
    digits = data_fingerprint(digits_dls())
    assert digits == data_fingerprint(digits_dls(seed=3, batch_size=64)) and differences(digits, data_fingerprint(digits_dls(split_seed=3)))
    assert differences(digits, data_fingerprint(digits_dls(channels=3)))[0] == 'images have 3 channels, not 1'
    assert differences(digits, data_fingerprint(digits_dls(size=8)))
    one = digits_dls()
    assert {name: mark[0] for name, mark in digits['parts']['train'].items()} == {str(i): int(n) for i, n in enumerate(one.train_ds.labels.bincount())}
    one.train_ds.pixels[7, 0, 3, 3] += 1
    assert differences(digits, data_fingerprint(one)) == [f"class '{int(one.train_ds.labels[7])}' has other training images, or changed ones"]
    assert differences(digits, digits | dict(classes=digits['classes'][::-1])) == ['the classes are numbered in another order']
    for split in 'train', 'validation':
        pictures = sorted((tree / split).glob('*/*'))
        files = {f'{file.parent.name}/{file.name}': file for file in pictures}
        tar_of(files, tmp_path / f'{split}.tar')
    packed = data_fingerprint(tree_dls(tmp_path))
    assert packed == data_fingerprint(tree_dls(tmp_path)) and packed['parts']['train']['3'][0] == 20
    most = dict(list(files.items())[:-1])
    for last, words in (most, "class '9' has 19 held-out images, not 20"), (most | {'9/another.jpg': pictures[-1]}, "class '9' has other held-out images, or changed ones"):
        tar_of(last, tmp_path / 'validation.tar')
        assert differences(packed, data_fingerprint(tree_dls(tmp_path))) == [words]


def test_splits_are_found_by_their_usual_names(tree, tmp_path):
    for train, valid in (('train', 'val'), ('training', 'validation'), ('train', 'valid'), ('train', 'test')):
        root = tmp_path / f'{train}{valid}'
        shutil.copytree(tree / 'train', root / train)
        shutil.copytree(tree / 'validation', root / valid)
        assert find_split(root, 'train').name == train and find_split(root, 'validation').name == valid
        assert folder_summary(root).split is None
