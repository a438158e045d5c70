"From a file to a batch: Table 4 in effect, and files that are not as they should be."
import io
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import nn

warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)
from data_help import epoch, same, tree_dls
from timm.models.vision_transformer import VisionTransformer

from vitdynconv.data import cluttered_digits_dls, digits_dls, imagenet_dls, preflight, write_imagefolder
from vitdynconv.data.images import as_rgb, image_transforms
from vitdynconv.train.recipes import RECIPES


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




# --- depth, rotation, crop


def saved(array, kind, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return Image.open(file)


@pytest.mark.parametrize('dtype', ['uint16', '>u2', 'int32', 'float32'])
@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_deep_pictures_are_scaled_not_clipped(dtype, kind):
    if kind == 'png' and dtype != 'uint16': pytest.skip('no such PNG')
    ramp = np.arange(256).reshape(16, 16)
    deep = (ramp / 255).astype(dtype) if dtype == 'float32' else (ramp * 257).astype(dtype)
    pixels = np.array(as_rgb(saved(deep, kind)))
    assert pixels.shape == (16, 16, 3) and (pixels == ramp[..., None]).all()


def test_what_is_deeper_than_16_bits_is_unreadable_not_white():
    with pytest.raises(ValueError, match='neither 8 nor 16 bits'): as_rgb(Image.fromarray(np.full((4, 4), 2**20, np.int32)))
    with pytest.raises(ValueError, match='neither 8 nor 16 bits'): as_rgb(Image.fromarray(np.full((4, 4), -1, np.int32)))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr'])
def test_shallow_pictures_are_converted_as_pillow_does(mode):
    picture = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).convert(mode)
    assert (np.array(as_rgb(picture)) == np.array(picture.convert('RGB'))).all()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    "The stored pixels, turned by hand as the EXIF standard says, through every way to a batch."
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :8] = 255   # the top left corner is white
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
              6: np.rot90(upright), 7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for split in 'train', 'val':
        for i, name in enumerate('ab'):
            (tmp_path / split / name).mkdir(parents=True)
            for j in range(2):
                pixels = np.clip(stored.astype(int) + (split == 'val') * 3 + j + 2 * i, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{j}.png', exif=exif)
    for reader, changes in (('', {}), ('torch/folder', dict(options=dict(search_split=True)))):
        if reader: dls = imagenet_dls(tmp_path / 'val', reader, batch_size=2, input_size=24, workers=0, crop_pct=1.)
        else: dls = imagenet_dls(tmp_path, batch_size=2, input_size=24, workers=0, crop_pct=1.)
        picture, _ = dls.valid_ds.read(0)
        assert picture.size == (40, 24)
        assert np.array(picture)[:8, :8].mean() > 200 and np.array(picture)[:8, 32:].mean() < 50 and np.array(picture)[16:, :8].mean() < 50


def test_damaged_exif_does_not_make_a_picture_unreadable():
    picture = saved(np.zeros((4, 4, 3), np.uint8), 'png', exif=b'Exif\x00\x00MM\x00*\xff\xff\xff\xff')
    assert as_rgb(picture).size == (4, 4)


def test_the_evaluation_crop_is_what_crop_pct_says(tmp_path):
    "A black picture in a white frame: the share that is shown tells the crop."
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = 0
    for split in 'train', 'val':
        for i, name in enumerate('ab'):
            (tmp_path / split / name).mkdir(parents=True)
            for j in range(2):
                pixels[0, 0] = (split == 'val', i, j)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{j}.png')
    for crop, least, most in ((0.5, 0, 0.02), (1., 0.7, 0.8), (0.8, 0.55, 0.65)):
        dls = imagenet_dls(tmp_path, batch_size=2, input_size=32, workers=0, crop_pct=crop, mean=(0,) * 3, std=(1,) * 3)
        white = (dls.valid.one_batch()[0] > 0.5).float().mean()
        assert least <= white <= most, (crop, white)


def test_grey_loaders_for_grey_networks(tree):
    grey, colour = tree_dls(tree, in_chans=1), tree_dls(tree)
    x, c = grey.valid.one_batch()[0], colour.valid.one_batch()[0]
    assert x.shape == (20, 1, 32, 32)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (colour.train_ds.mean, colour.train_ds.std))
    by_hand = ((c * std + mean) * torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert (x * grey.train_ds.std[0] + grey.train_ds.mean[0] - by_hand).abs().max() < 1 / 255
    net = lambda channels: VisionTransformer(img_size=32, in_chans=channels, patch_size=8, embed_dim=24, depth=1, num_heads=1, num_classes=10)
    preflight(grey, net(1)), preflight(colour, net(3)), preflight(digits_dls(), net(1))
    for dls, channels, in_chans in ((grey, 3, None), (colour, 1, None), (digits_dls(), 3, None), (colour, 3, 1)):
        with pytest.raises(ValueError, match=r'takes [13] channels but the images have [13]'): preflight(dls, net(channels), in_chans)
    with pytest.raises(ValueError, match='in_chans=4'): tree_dls(tree, in_chans=4)


def test_what_could_not_be_read_is_not_counted_as_evaluated(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / 'some')
    for file in sorted(root.glob('validation/5/*'))[:7]: file.write_bytes(file.read_bytes()[:300])
    for workers in (0, 2):
        dls = tree_dls(root, workers=workers)
        seen = sum(len(y) for _, y in dls.valid)
        assert seen == dls.valid.n_readable == 193 and len(dls.valid.skipped) == 7
    parts = [tree_dls(root, rank=rank, world=2).valid for rank in range(2)]
    for part in parts: assert sum(len(y) for _, y in part) == part.n_readable
    assert sum(part.n_readable for part in parts) == 193
