"The sequence of draws, and fastai on top of it."
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)
import fastai.callback.progress
from data_help import epoch, same, states, tree_dls
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from timm.models.vision_transformer import VisionTransformer

from vitdynconv.data import cluttered_digits_dls, digits_dls
from vitdynconv.data.imagenet import own_device
from vitdynconv.data.tensors import TensorLoader


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


# --- digits, held out and not


def test_no_held_out_digit_is_trained_on(monkeypatch):
    "Each digit is painted with its own number; so are the copies in the cluttered pictures."
    from vitdynconv.data.digits import digits_split
    x, y, train, valid = digits_split()
    assert sorted(torch.cat([train, valid]).tolist()) == list(range(1797))
    plain = digits_dls(size=8, shift=0)
    assert torch.equal(plain.train_ds.pixels, x[train]) and torch.equal(plain.valid_ds.pixels, x[valid])
    assert torch.equal(plain.train_ds.labels, y[train]) and torch.equal(plain.valid_ds.labels, y[valid])
    used = []
    def record(digits, *args): used.append(digits); return torch.zeros(len(digits), 3, 32, 32)
    monkeypatch.setattr('vitdynconv.data.digits.clutter', record)
    for held_out, share in (('test', x[valid]), ('tune', None)):
        used.clear()
        cluttered_digits_dls(copies=2, held_out=held_out)
        fit, judged = (digits.view(2, -1, 64)[0] for digits in used)
        if share is not None: assert torch.equal(fit, x[train].flatten(1)) and torch.equal(judged, share.flatten(1))
        else: assert sorted(torch.cat([fit, judged]).tolist()) == sorted(x[train].flatten(1).tolist())
        assert len(fit) + len(judged) == (1797 if share is not None else len(train))


@pytest.mark.parametrize('make', [digits_dls, cluttered_digits_dls])
def test_normalization_comes_from_the_training_images_alone(make):
    dls = make()
    pixels = dls.train_ds.pixels.double()
    for data in (dls.train_ds, dls.valid_ds):
        assert torch.allclose(torch.tensor(data.mean).double(), pixels.mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(torch.tensor(data.std).double(), pixels.std((0, 2, 3)), atol=1e-6)
    images = dls.train_ds.images.double()
    assert images.mean((0, 2, 3)).abs().max() < 1e-5 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-5
    assert dls.valid_ds.images.double().mean((0, 2, 3)).abs().min() > 1e-4, 'held-out images have statistics of their own'


def test_no_part_of_a_photograph_is_in_both_splits(monkeypatch):
    "Photographs red on the left 60% and blue on the right 40%, digits without ink: training pictures hold no blue, held-out ones no red."
    photos = np.zeros((2, 427, 640, 3), np.uint8)
    photos[:, :, :384, 0], photos[:, :, 384:, 2] = 255, 255
    blank = dict(images=np.zeros((1797, 8, 8)), target=np.arange(1797) % 10)
    monkeypatch.setattr('vitdynconv.data.digits.load_sample_images', lambda: type('Photos', (), dict(images=list(photos))))
    monkeypatch.setattr('vitdynconv.data.digits.load_digits', lambda: type('Digits', (), blank))
    for held_out in 'test', 'tune':
        dls = cluttered_digits_dls(copies=1, light=1., held_out=held_out)
        train, valid = dls.train_ds.pixels, dls.valid_ds.pixels
        assert train[:, 2].max() == 0 and valid[:, 0].max() == 0
        assert train[:, 0].amax((1, 2)).min() > 0.9 and valid[:, 2].amax((1, 2)).min() > 0.9


# --- fastai's own habits


def small_learner(dls, loss=None):
    "A plain fastai Learner, without anything of this library but the loaders."
    torch.manual_seed(0)
    x = dls.train.one_batch()[0]
    model = VisionTransformer(img_size=x.shape[-1], in_chans=x.shape[1], patch_size=8, embed_dim=24, depth=1, num_heads=1, num_classes=10)
    return Learner(dls, model, loss, metrics=accuracy)


def few_digits(**changes):
    dls = digits_dls(batch_size=64, **changes)
    dls.train.dataset.pixels, dls.train.dataset.labels = dls.train_ds.pixels[:192], dls.train_ds.labels[:192]
    return dls


@pytest.mark.parametrize('callback', [MixUp, CutMix])
def test_fastais_mixing_and_default_loss(callback):
    learn = small_learner(few_digits())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=callback())
    assert np.isfinite(learn.recorder.values[-1][0])


@pytest.mark.parametrize('workers', [None, 0, 2])
def test_tta_augments_for_a_while(tree, workers):
    dls = few_digits() if workers is None else tree_dls(tree, workers=workers)
    learn = small_learner(dls)
    plain = list(dls.valid)
    with learn.no_bar():
        straight, targets = learn.get_preds()
        averaged, same_targets = learn.tta(n=3)
        best = learn.tta(n=3, use_max=True)[0]
    assert torch.equal(targets, same_targets) and averaged.shape == straight.shape
    assert 1e-5 < (averaged - straight).abs().mean() < 0.2 and (best >= straight).all()
    assert dls.valid_ds.split_idx == 1 and same(plain, epoch(dls.valid)), 'augmentation ends with it'


def test_augmented_validation_images_come_from_the_training_transform():
    dls = few_digits(shift=1)
    whole = torch.cat([x for x, _ in dls.valid])
    with dls.valid_ds.set_split_idx(0): moved = torch.cat([x for x, _ in epoch(dls.valid, 3)])
    stays = (whole == moved).flatten(1).all(1).float().mean()
    assert 0.4 < stays < 0.7


def test_vision_learner_needs_nothing_but_the_loaders():
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    dls = few_digits(channels=3, size=32)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.model[-1][-1].out_features == 10 and len(dls.after_batch.fs) == 1


def test_batch_transforms_added_in_fastais_way(tree):
    from fastai.data.transforms import Normalize
    from fastai.vision.augment import Flip, RandTransform
    assert issubclass(Flip, RandTransform)
    plain, dls = epoch(tree_dls(tree).train, 1), tree_dls(tree)
    dls.add_tfms([Flip(p=1.)], 'after_batch')
    flipped = epoch(dls.train, 1)
    for (x, y), (x2, y2) in zip(plain, flipped, strict=True):
        assert torch.equal(y, torch.as_tensor(y2)) and torch.allclose(x.flip(3), torch.as_tensor(x2), atol=1e-4)
    for (x, _), (x2, _) in zip(flipped, epoch(dls.train, 1)): assert torch.equal(x, x2), 'the epoch decides'
    for (x, _), (x2, _) in zip(dls.valid, tree_dls(tree).valid, strict=True):
        assert torch.allclose(x.as_subclass(torch.Tensor), x2, atol=1e-4), 'held-out images are not flipped'
    assert dls.after_batch.fs.filter(lambda t: isinstance(t, Normalize)), 'fastai adds no second normalization'


@pytest.mark.parametrize('make', [digits_dls, cluttered_digits_dls])
def test_held_tensors_predict_what_they_are_given(make):
    dls = make(batch_size=64)
    learn = small_learner(dls)
    with learn.no_bar():
        everything = learn.get_preds()[0]
        name, number, probabilities = learn.predict(dls.valid_ds.images[5])
    assert torch.allclose(probabilities, everything[5], atol=1e-5) and name == dls.vocab[int(number)]


def test_new_images_in_every_form(tree):
    dls = digits_dls(size=16)
    picture = Image.fromarray((dls.valid_ds.pixels[3, 0] * 255).round().byte().numpy())
    for item in (dls.valid_ds.images[3], picture, (dls.valid_ds.pixels[3] * 255).round().byte()):
        made = dls.valid.new([item])
        assert (made.dataset.pixels[0] - dls.valid_ds.pixels[3]).abs().max() < 0.003 and made.dataset.labels is None
