"Training, evaluation and prediction see the same picture, whatever its size and wherever it comes from."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitdynconv.data.fashion import sample_images
from vitdynconv.train.build import crop_share, recipe_dls, run_images, weights_images
from vitdynconv.train.evaluate import evaluation_loaders
from vitdynconv.train.prediction import PictureTransform, transform_of
from vitdynconv.train.recipes import RECIPES
from vitdynconv.train.session import new_record

SIZES = [*range(8, 65), 112, 224]
LEVEL = 1 / 255


@pytest.fixture
def clothes(monkeypatch):
    "Noise of 28 x 28 in place of Fashion-MNIST."
    noise = torch.Generator().manual_seed(0)
    parts = [(torch.randint(256, (6, 1, 28, 28), generator=noise, dtype=torch.uint8), torch.arange(6)) for _ in range(2)]
    monkeypatch.setattr("vitdynconv.data.fashion.fashion_parts", lambda *_: parts)
    return parts[1][0]


def seen_in_training(recipe, data=""):
    "The held-out pictures as the network sees them between two epochs, and the transform that a file of the run gives."
    dls = recipe_dls(recipe, data)
    record = json.loads(json.dumps(new_record(recipe, dls, dict(data=data, reader=""))))
    return torch.cat([x for x, _ in dls.valid]), transform_of(recipe, record), record, dls


def near(here, there):
    "Equal bytes, normalized in another order of operations."
    return here.shape == there.shape and (here - there).abs().max() < 1e-5


def picture(pixels):
    "A picture from grey pixels (1, h, w)."
    return Image.fromarray(pixels[0].numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_clothes_of_every_size(clothes, size, channels):
    recipe = RECIPES["fashion"].replace(img_size=size, in_chans=channels, batch_size=2)
    seen, transform, record, _ = seen_in_training(recipe, "fashion")
    said = torch.stack([transform(picture(each)) for each in clothes])
    assert torch.equal(said, seen) and transform_of(recipe, dict(data="fashion")).settings["crop_pct"] == record["crop_pct"]


@pytest.mark.parametrize("size", SIZES)
def test_bundled_pictures_of_every_size(size):
    samples = sample_images(size)
    settings = dict(input_size=size, interpolation="bilinear", crop_pct=crop_share(size, 28), mean=samples.mean, std=samples.std)
    said = torch.stack([PictureTransform(settings)(picture(each)) for each in samples.pixels[:5]])
    assert torch.equal(said, samples.images[:5])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 9, 16, 18, 24, 29, 36, 64])
def test_digits_of_every_size(size, channels):
    "Digits are numbers from 0 to 16; a picture has bytes: one level from the digit, one from the enlarged one."
    from sklearn.datasets import load_digits
    from vitdynconv.data.digits import digits_split
    seen, transform, *_ = seen_in_training(RECIPES["digits"].replace(img_size=size, in_chans=channels))
    held_out = load_digits().images[digits_split()[3]][:20]
    said = torch.stack([transform(Image.fromarray((each * 255 / 16).round().astype(np.uint8))) for each in held_out])
    assert ((said - seen[:20]).abs() * transform.std).max() < 1.6 * LEVEL


def write_pictures(root, mode, sizes):
    noise = np.random.default_rng(0)
    for name in "red", "blue":
        (root/name).mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root/name/f"{number}.png")


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3), ("RGB", 1)])
@pytest.mark.parametrize("size", [9, 16, 29, 36])
def test_pictures_in_folders(tmp_path, size, mode, channels):
    write_pictures(tmp_path/"pictures", mode, [(20, 31), (40, 17), (64, 64), (9, 90), (33, 28)])
    recipe = RECIPES["pictures"].replace(img_size=size, in_chans=channels, batch_size=2, workers=0, crop_pct=.7, interpolation="bilinear")
    seen, transform, record, dls = seen_in_training(recipe, str(tmp_path/"pictures"))
    names = [dls.valid.dataset.source.reader[index][0] for index in range(len(seen))]
    assert near(torch.stack([transform(Image.open(name)) for name in names]), seen)
    evaluated, _ = evaluation_loaders(recipe.replace(num_classes=2), record, "", "", "RUN")
    assert torch.equal(torch.cat([x for x, _ in evaluated.valid]), seen)


@pytest.mark.parametrize("data, size", [("fashion", 29), ("fashion", 36), ("fashion", 18), ("", 16), ("", 9)])
def test_an_evaluation_on_files_sees_what_the_run_has_seen(clothes, tmp_path, data, size):
    "The record decides, not the recipe, which says nothing of clothes and digits."
    recipe = RECIPES["fashion" if data else "digits"].replace(img_size=size, batch_size=2)
    _, transform, record, _ = seen_in_training(recipe, data)
    for split in "train", "validation":
        for number, name in enumerate(record["classes"]):
            folder = tmp_path/split/name.replace("/", "-")
            folder.mkdir(parents=True)
            picture(clothes[number % 6] // (1 + (split == "train"))).save(folder/"a.png")
    record["classes"] = [name.replace("/", "-") for name in record["classes"]]
    if data: record["classes"].sort()
    dls, _ = evaluation_loaders(recipe, record, str(tmp_path), "", "RUN")
    names = [dls.valid.dataset.source.reader[index][0] for index in range(10)]
    assert near(torch.cat([x for x, _ in dls.valid]), torch.stack([transform(Image.open(name)) for name in names]))


def test_bundled_weights_get_pictures_as_they_know_them():
    recipe = RECIPES["pictures"].replace(model="vdc_vit_fashion", pretrained=True, model_args={}, crop_pct=None)
    assert weights_images(recipe.replace(in_chans=1)) == dict(mean=(.286,), std=(.353,), crop_pct=1.0)
    assert weights_images(recipe)["mean"] == (.286,) * 3 and run_images(recipe, "folder")["crop_pct"] == 1.0
