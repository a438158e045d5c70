"The networks that come with the library: every file is there, small, honest about its accuracy, and found by name without a network."
import dataclasses, json, socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from vitdynconv.data.fashion import CLASSES, DEBIAN, MEAN, STD, find_fashion, first_of_each, read_split, sample_images
from vitdynconv.models import create_model
from vitdynconv.models.bundled import FASHION_BODIES, bundled, bundled_folder, bundled_record, weights_path
from vitdynconv.train.prediction import load_run

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = [(row["name"], row["activation"], row["kernel"]) for row in bundled()]
has_data = pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Nothing here may ask for a connection."
    def refuse(*args, **kwargs): raise AssertionError("asked for a network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_what_the_issue_asks_for_is_there():
    assert {(n, a, k) for n, a, k in NETWORKS} == {
        ("vdc_vit_fashion", "softmax", "pair"), ("vdc_vit_fashion", "scaling_relu", "pair"), ("vdc_vit_fashion", "ln_relu", "pair"),
        ("vdc_vit_fashion", "scaling", "depthwise"), ("vdc_swin_fashion", "softmax", "pair"), ("vdc_swin_fashion", "ln_relu", "pair"),
        ("vdc_swin_fashion", "scaling", "depthwise")}
    files = sorted(bundled_folder().glob("*.safetensors"))
    assert files == sorted(weights_path(*network) for network in NETWORKS)
    assert sum(file.stat().st_size for file in files) < 4_000_000
    assert "MIT" in (bundled_folder()/"LICENSE-fashion-mnist.txt").read_text()


@pytest.mark.parametrize("network", NETWORKS, ids="-".join)
def test_a_file_says_what_it_is(network):
    with safe_open(weights_path(*network), "pt") as file:
        recipe, record = (json.loads(file.metadata()[part]) for part in ("recipe", "run"))
        assert all(file.get_tensor(name).dtype == torch.half for name in file.keys())
    size = FASHION_BODIES[network[0]].settings["img_size"]
    assert (recipe["model"], recipe["activation"], recipe["kernel"], recipe["img_size"]) == (*network, size)
    assert record["classes"] == CLASSES and (record["mean"], record["std"]) == ([MEAN], [STD])
    assert record["input_size"] == size and record["crop_pct"] == size/28 and record["data"] == "fashion"
    assert record["seed"] == recipe["seed"] and len(record["commit"]) == 40 and len(record["curve"]) == recipe["epochs"]
    assert record["accuracy"] > .8 and record["license"] == "MIT"
    from vitdynconv.study.weights import weights_recipe
    now = json.loads(json.dumps(dataclasses.asdict(weights_recipe(*network))))
    assert all(now[field] == value for field, value in recipe.items()) and len(recipe) > 40, "the command trains something else"


@pytest.mark.parametrize("network", NETWORKS, ids="-".join)
def test_a_name_gives_the_network_of_the_file(network):
    name, activation, kernel = network
    size = FASHION_BODIES[name].settings["img_size"]
    ours = create_model(name, activation, kernel, pretrained=True).eval()
    direct = timm.create_model(name, pretrained=True, activation=activation, kernel=kernel).eval()
    run, samples = load_run(weights_path(*network)), sample_images(size)
    with torch.no_grad(): logits, same, read = (model(samples.images) for model in (ours, direct, run.model))
    assert torch.equal(logits, same) and torch.equal(logits, read)
    assert not torch.equal(logits, create_model(name, activation, kernel).eval()(samples.images)), "random weights are others"
    right = (logits.argmax(1) == samples.labels).sum().item()
    assert abs(right - bundled_record(weights_path(*network))["samples"]) <= 1       # another processor rounds elsewhere: one image may be on the edge
    assert [CLASSES[i] for i in logits.argmax(1)[:8]] == [p.label for p in run.predict(pictures(samples, 8))], "a picture file is prepared as in training"


def pictures(samples, count):
    "The first of the 200 images as Pillow pictures of 28 x 28."
    from PIL import Image
    return [Image.fromarray(pixels[0].numpy()) for pixels in samples.pixels[:count]]


@has_data
@pytest.mark.parametrize("network", NETWORKS, ids="-".join)
def test_the_stored_accuracy_is_what_vdc_eval_counts(network, tmp_path):
    from vitdynconv.train.evaluate import vdc_eval
    path = weights_path(*network)
    vdc_eval(str(path), json=str(tmp_path/"result.json"))
    row, = json.loads((tmp_path/"result.json").read_text())
    assert row["images"] == 10_000 and row["top1"] == pytest.approx(bundled_record(path)["accuracy"], abs=2.5e-4)    # the same machine: equal; another may round two images across the edge


@has_data
def test_the_200_images_are_the_first_of_each_class():
    pixels, labels = first_of_each(*read_split("test", *find_fashion(fetch=False)["test"]), 20)
    samples = sample_images()
    assert torch.equal(samples.pixels, pixels) and torch.equal(samples.labels, labels)


def test_the_200_images_need_nothing_else():
    samples = sample_images()
    assert samples.pixels.shape == (200, 1, 28, 28) and samples.pixels.dtype == torch.uint8
    assert samples.labels.bincount().tolist() == [20]*10 and samples.vocab == CLASSES
    assert torch.equal(sample_images(24).images, samples.images[..., 2:26, 2:26])
    with pytest.raises(ValueError, match="size=4 is out of range"): sample_images(4)


@pytest.mark.parametrize("settings, said", [
    (dict(activation="relu"), "with relu"), (dict(activation="scaling"), "with scaling"), (dict(activation=torch.nn.Identity()), "with Identity"),
    (dict(pos="abs"), "pos='abs'"), (dict(class_token=True), "class_token=True")], ids=str)
@pytest.mark.parametrize("make", [create_model, timm.create_model])
def test_what_was_not_trained_is_refused_in_one_line(make, settings, said):
    with pytest.raises(ValueError) as error: make("vdc_vit_fashion", pretrained=True, **settings)
    words = str(error.value)
    assert said in words and "vdc_vit_fashion" in words and "\n" not in words
    if "activation" in settings: assert all(row["name"] in words and (row["activation"] in words or row["kernel"] in words) for row in bundled())
    assert make("vdc_vit_fashion", **settings).num_classes == 10, "without trained weights it exists"


def test_trained_weights_go_with_other_sizes():
    for settings, shape in (dict(num_classes=3), (2, 3)), (dict(num_classes=0), (2, 48)), (dict(img_size=42), (2, 10)):
        size = settings.get("img_size", 28)
        assert create_model("vdc_vit_fashion", pretrained=True, **settings)(torch.randn(2, 1, size, size)).shape == shape
    trained, other = (create_model("vdc_vit_fashion", pretrained=True, **s).state_dict() for s in ({}, dict(num_classes=3)))
    assert torch.equal(trained["blocks.1.attn.qkv.weight"], other["blocks.1.attn.qkv.weight"])


def test_the_classes_of_the_registry_are_those_of_the_data():
    for name in FASHION_BODIES:
        config = create_model(name).pretrained_cfg
        assert config["label_names"] == CLASSES and (config["mean"], config["std"]) == ((MEAN,), (STD,))
