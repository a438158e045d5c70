"The bundled networks can be trained again: what was stopped goes on to the same weights, what is done is left alone, the file says what it holds."
import json
from pathlib import Path

import pytest
import torch

from vitdynconv.data.fashion import DEBIAN
from vitdynconv.models.bundled import FASHION_BODIES, file_name
from vitdynconv.study import weights as module
from vitdynconv.study.command import vdc_study
from vitdynconv.study.weights import EpochLine, train_bundled, train_weights, variant_name, wanted, weights_recipe
from vitdynconv.train.prediction import load_run

has_data = pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
FEW = dict(per_class=16)


def test_the_list_is_the_list_of_the_bodies():
    assert {(name, variant_name((name, a, k))) for name, a, k in wanted()} == {(name, v) for name, body in FASHION_BODIES.items() for v in body.weights}
    for one in wanted(): assert weights_recipe(*one).model == one[0] and weights_recipe(*one).img_size == FASHION_BODIES[one[0]].settings["img_size"]


@has_data
def test_what_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    recipe = weights_recipe("vdc_vit_fashion", "ln_relu", "pair", epochs=2, warmup_epochs=0.)
    whole = train_bundled(recipe, tmp_path/"a", tmp_path/"a.safetensors", **FEW)
    def stop(self): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(EpochLine, "after_epoch", stop)
        with pytest.raises(KeyboardInterrupt): train_bundled(recipe, tmp_path/"b", tmp_path/"b.safetensors", **FEW)
    assert not (tmp_path/"b.safetensors").exists() and (tmp_path/"b/last.ckpt").exists()
    resumed = train_bundled(recipe, tmp_path/"b", tmp_path/"b.safetensors", **FEW)
    a, b = (load_run(tmp_path/f"{name}.safetensors").model.state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole["accuracy"] == resumed["accuracy"] and whole["curve"] == resumed["curve"] and len(whole["curve"]) == 2
    assert whole["parameters"] == sum(w.numel() for w in a.values())


def test_the_command_trains_what_has_no_file(tmp_path, monkeypatch, capsys):
    trained = []
    def train(recipe, folder, file, **data):
        trained.append((recipe.model, recipe.activation, recipe.kernel))
        file.write_text("weights")
        return dict(accuracy=.5, samples=100)
    monkeypatch.setattr(module, "train_bundled", train)
    first = wanted()[0]
    (tmp_path/file_name(first[0], variant_name(first))).write_text("there")
    vdc_study(weights=True, out=str(tmp_path))
    assert trained == wanted()[1:] and len(list(tmp_path.glob("*.safetensors"))) == 7
    assert (tmp_path/file_name(first[0], variant_name(first))).read_text() == "there" and "50.00% of the test images" in capsys.readouterr().out
    (tmp_path/"file").write_text("")
    with pytest.raises(SystemExit) as end: vdc_study(weights=True, out=str(tmp_path/"file"))
    assert end.value.code == 2 and "is a file" in capsys.readouterr().err
