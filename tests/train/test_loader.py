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

from vitdynconv.data import cluttered_digits_dls, digits_dls, fashion_dls
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
