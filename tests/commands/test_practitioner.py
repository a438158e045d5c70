"From a folder of pictures to a prediction: what a run knows of itself, what it refuses, and what it hands on."
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import settings
from PIL import Image
from safetensors import safe_open

from vitdynconv import load_run, predict
from vitdynconv.bench import vdc_bench
from vitdynconv.demo import vdc_demo
from vitdynconv.framework.commands import vdc_equiv
from vitdynconv.models.commands import vdc_convert, vdc_cost
from vitdynconv.train.evaluate import vdc_eval
from vitdynconv.train.export import vdc_export
from vitdynconv.train.prediction import vdc_predict
from vitdynconv.train.recipes import RECIPES
from vitdynconv.train.record import LOCK, RunLock
from vitdynconv.train.run import vdc_train
from vitdynconv.study.command import vdc_study

SMALL = dict(epochs="2", img_size="16", depth="1", embed_dim="32", num_heads="2", workers="0")
COLOURS = dict(blue=(40, 60, 220), green=(30, 200, 60), red=(220, 40, 30))


def write_pictures(root, colours=COLOURS, images=12, size=20):
    "A folder for each colour."
    for name, colour in colours.items():
        (root/name).mkdir(parents=True)
        for number in range(images): Image.new("RGB", (size + number, size), colour).save(root/name/f"{name}_{number:02}.png")
    return root


def line(capsys, function, code=2, **arguments):
    "The one line that a command ends with."
    capsys.readouterr()
    with pytest.raises(SystemExit) as end: function(**arguments)
    said = capsys.readouterr().err
    assert end.value.code == code and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with pictures and a run on them, started with a relative path."
    home = tmp_path_factory.mktemp("home")
    write_pictures(home/"pictures")
    before = Path.cwd()
    os.chdir(home)
    try: vdc_train(data="pictures", out="RUN", **SMALL)
    finally: os.chdir(before)
    return home


@pytest.fixture
def copied(home, tmp_path):
    "The same run and pictures, to be damaged."
    run = shutil.copytree(home/"RUN", tmp_path/"RUN")
    shutil.copytree(home/"pictures", tmp_path/"pictures")
    return run


@pytest.mark.parametrize("name", ["run.json", "best.safetensors", "model.safetensors", "model_ema.safetensors", "last.ckpt"])
def test_every_file_of_a_run_explains_it(home, name):
    path = home/"RUN"/name
    if name.endswith("json"): record = json.loads(path.read_text())
    elif name.endswith("ckpt"): record = torch.load(path, weights_only=True)["run"]
    else:
        with safe_open(path, "pt") as file: record = json.loads(file.metadata()["run"])
    assert record["classes"] == ["blue", "green", "red"] and record["in_chans"] == 3
    assert len(record["mean"]) == len(record["std"]) == 3 and record["input_size"] == 16 and record["crop_pct"]
    assert record["data"] == str(home/"pictures") and "--data pictures" in record["command"]
    assert record["fingerprint"]["parts"]["train"]["red"][0] == 10


@pytest.mark.parametrize("name", ["", "best.safetensors", "model.safetensors", "last.ckpt"])
def test_a_run_or_one_file_of_it_is_enough_to_predict(home, tmp_path, name):
    place = home/"RUN"
    if name: place = shutil.copy(place/name, tmp_path/name)
    run = load_run(place)
    assert run.classes == ["blue", "green", "red"] and not run.model.training
    said = predict(run, home/"pictures", top=2)
    assert len(said) == 36 and all(len(each.classes) == 2 for each in said)
    right = [Path(each.image).parent.name == each.label for each in said]
    assert sum(right) / 36 > 0.5
    picture = Image.open(home/"pictures/red/red_00.png")
    one, = predict(place, picture, top=9)
    assert sorted(one.classes) == run.classes and sum(one.probabilities) == pytest.approx(1, abs=1e-5)
    logits = run.model(run.transform(picture)[None])
    assert one.label == run.classes[logits.argmax()]


def test_the_command_predicts(home, tmp_path, capsys):
    vdc_predict(images=[str(home/"pictures/red")], run=str(home/"RUN"), top=2, csv=str(tmp_path/"names.csv"))
    assert "class_2" in capsys.readouterr().out
    rows = (tmp_path/"names.csv").read_text().splitlines()
    assert len(rows) == 13 and rows[0] == "image,class_1,probability_1,class_2,probability_2"


def test_best_is_the_best_epoch(home):
    import csv
    rows = list(csv.DictReader((home/"RUN/history.csv").open()))
    best = max(rows, key=lambda row: (max(float(row["accuracy"]), float(row["ema_accuracy"])), int(row["epoch"])))
    kept = torch.load(home/"RUN"/f"best-{int(best['epoch']):04}.ckpt", weights_only=True)
    part = "ema" if float(best["ema_accuracy"]) > float(best["accuracy"]) else "model"
    with safe_open(home/"RUN/best.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), kept[part][name]) for name in file.keys())


NAMES = dict(torch="out.pt2", timm="out.safetensors", hf="out")


@pytest.mark.parametrize("format", NAMES)
def test_exports_give_the_same_logits(home, tmp_path, format):
    import timm
    run = load_run(home/"RUN")
    images = torch.randn(5, 3, 16, 16)
    vdc_export(run=str(home/"RUN"), format=format, out=str(tmp_path/NAMES[format]))
    if format == "torch": same = torch.export.load(tmp_path/"out.pt2").module()
    if format == "hf": same = timm.create_model(f"local-dir:{tmp_path/'out'}", pretrained=True).eval()
    if format == "timm":
        with safe_open(tmp_path/"out.safetensors", "pt") as file: header = file.metadata()
        same = timm.create_model(header["model"], checkpoint_path=tmp_path/"out.safetensors", **json.loads(header["arguments"])).eval()
    assert torch.allclose(same(images), run.model(images), atol=1e-4)


def test_a_hub_export_names_its_classes(home, tmp_path):
    import timm
    vdc_export(run=str(home/"RUN"), format="hf", out=str(tmp_path/"out"))
    assert timm.create_model(f"local-dir:{tmp_path/'out'}", pretrained=True).pretrained_cfg["label_names"] == ["blue", "green", "red"]


def test_an_export_that_differs_is_not_written(home, tmp_path, monkeypatch, capsys):
    from vitdynconv.train import export
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    program = torch.export.export(other, (torch.zeros(2, 3, 16, 16),), dynamic_shapes={"input": {0: torch.export.Dim("batch", min=1)}})
    monkeypatch.setattr(export, "torch_program", lambda run: program)
    assert "differs from the original" in line(capsys, vdc_export, run=str(home/"RUN"), format="torch", out=str(tmp_path/"out.pt2"))
    assert not list(tmp_path.iterdir())


def test_the_pictures_it_gets_wrong_are_shown(home):
    import numpy as np
    picture = np.asarray(Image.open(home/"RUN/mistakes.png").convert("RGB"))
    assert picture.shape[1] > 600 and picture.std() > 20


def test_the_average_of_a_short_run_remembers_a_part_of_it(home):
    "Ten steps with a decay of .99 would leave the average where it began."
    recipe = json.loads((home/"RUN/recipe.json").read_text())
    assert recipe["ema_decay"] == 0 and RECIPES["pictures"].ema_decay == .99
    from vitdynconv.train.run import fit_to_pictures
    assert fit_to_pictures(RECIPES["pictures"].replace(epochs=200), home/"pictures", {}).ema_decay == pytest.approx(1 - 10 / 1000)
    assert fit_to_pictures(RECIPES["pictures"], home/"pictures", {"ema_decay"}).ema_decay == .99


def test_a_plan_counts_and_writes_nothing(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = sorted(home.rglob("*"))
    vdc_train(data="pictures", plan=True, out="PLANNED", gpus=2, gpu_memory=8., batch_size="8", **SMALL)
    said = capsys.readouterr().out
    assert "30 training images, 3 classes; 2 epochs, 6 steps" in said and "it fits" in said and "measured here" in said
    for word in "weights", "gradients", "moments", "backward pass", "GPU hours", "cores": assert word in said
    assert sorted(home.rglob("*")) == before


# Changed data

def rename(pictures): (pictures/"blue").rename(pictures/"violet")
def swap(pictures):
    for a, b in (("blue", "x"), ("red", "blue"), ("x", "red")): (pictures/a).rename(pictures/b)
def remove(pictures): (pictures/"green/green_03.png").unlink()
def add_class(pictures): shutil.copytree(pictures/"green", pictures/"yellow")
def vanish(pictures): shutil.rmtree(pictures)


@pytest.mark.parametrize("change, words", [(rename, "violet"), (swap, "has other training images"), (remove, "green"), (add_class, "4 classes"), (vanish, "pictures")])
def test_changed_data_are_named_before_a_run_goes_on(copied, capsys, change, words):
    pictures = copied.parent/"pictures"
    change(pictures)
    before = {path: path.read_bytes() for path in copied.iterdir()}
    assert words in line(capsys, vdc_train, resume=str(copied), data=str(pictures))
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


def test_changed_data_may_be_meant(copied):
    remove(copied.parent/"pictures")
    vdc_train(resume=str(copied), data=str(copied.parent/"pictures"), changed_data=True)


def test_moved_data_are_the_same_data(copied):
    moved = shutil.move(copied.parent/"pictures", copied.parent/"elsewhere")
    vdc_train(resume=str(copied), data=str(moved))


@pytest.mark.parametrize("change", [rename, add_class])
def test_evaluation_refuses_other_classes(copied, capsys, change):
    pictures = copied.parent/"pictures"
    change(pictures)
    assert "classes" in line(capsys, vdc_eval, checkpoint=str(copied/"best.safetensors"), data=str(pictures))


def test_evaluation_uses_the_data_of_the_run(home, capsys):
    vdc_eval(checkpoint=str(home/"RUN/best.safetensors"))
    assert " 6 " in capsys.readouterr().out  # two held-out pictures of each colour


def test_evaluation_takes_a_run_as_prediction_does(home, tmp_path):
    vdc_eval(run=str(home/"RUN"), json=str(tmp_path/"run.json"))
    vdc_eval(checkpoint=str(home/"RUN/best.safetensors"), json=str(tmp_path/"file.json"))
    vdc_eval(run=str(home/"RUN"), weights="ema", json=str(tmp_path/"average.json"))
    rows = [json.loads((tmp_path/f"{name}.json").read_text())[0] for name in ("run", "file", "average")]
    assert rows[0]["checkpoint"] == str(home/"RUN/best.safetensors") and rows[2]["checkpoint"] == str(home/"RUN/last.ckpt")
    assert rows[0]["loss"] == rows[1]["loss"] and rows[2]["weights"] == "ema"
    assert load_run(home/"RUN", "ema").path == str(home/"RUN/last.ckpt")


def test_evaluation_never_falls_back_to_the_digits(home, tmp_path, capsys):
    from vitdynconv.train.checkpoint import save_weights
    run = load_run(home/"RUN")
    save_weights(tmp_path/"bare.safetensors", run.model, run.recipe)
    assert "give --data" in line(capsys, vdc_eval, checkpoint=str(tmp_path/"bare.safetensors"))
    assert "ema" in line(capsys, vdc_eval, checkpoint=str(home/"RUN/best.safetensors"), weights="ema")


# Nothing is lost

def test_two_writers(copied, capsys):
    lock = RunLock(copied)
    for arguments in dict(resume=str(copied)), dict(out=str(copied)):
        assert f"process {os.getpid()} on {socket.gethostname()}" in line(capsys, vdc_train, **arguments)
    lock.release()
    assert not (copied/LOCK).exists()


@pytest.mark.parametrize("arguments", [dict(plan="quick"), dict(weights=True)], ids=["study", "weights"])
def test_two_studies_on_one_folder(tmp_path, capsys, arguments):
    from vitdynconv.study.plan import PLANS, open_study
    (tmp_path/"STUDY").mkdir()
    if "plan" in arguments: open_study(PLANS["quick"], tmp_path/"STUDY")
    lock = RunLock(tmp_path/"STUDY")
    before = sorted(tmp_path.rglob("*"))
    assert f"STUDY is being written by process {os.getpid()}" in line(capsys, vdc_study, out=str(tmp_path/"STUDY"), **arguments)
    assert sorted(tmp_path.rglob("*")) == before
    lock.release()


@pytest.mark.parametrize("reader", ["wds", "hfds"])
def test_a_reader_of_another_kind_of_data_is_answered_in_one_line(home, capfd, reader):
    "What its library says meanwhile stays unsaid."
    with pytest.raises(SystemExit) as end: vdc_train(data=str(home/"pictures"), reader=reader, out="NEW")
    out, errors = capfd.readouterr()
    assert end.value.code == 2 and not out and errors.count("\n") == 1, (out, errors)
    assert f"reader '{reader}' cannot open split" in errors and f"of '{home/'pictures'}'" in errors


def test_the_fingerprint_sees_a_replaced_picture(copied, capsys):
    "The same name, and another size in bytes."
    Image.effect_noise((40, 40), 90).convert("RGB").save(copied.parent/"pictures/red/red_03.png")
    assert "has other" in line(capsys, vdc_train, resume=str(copied), data=str(copied.parent/"pictures"))


def test_a_folder_with_a_recipe_and_a_photograph_is_not_a_run_that_has_begun(home, tmp_path, capsys):
    RECIPES["pictures"].save(tmp_path/"recipe.json")
    (tmp_path/"photo.jpg").write_text("mine")
    assert "is not empty" in line(capsys, vdc_train, data=str(home/"pictures"), out=str(tmp_path), **SMALL)
    assert (tmp_path/"photo.jpg").read_text() == "mine"


def test_a_lock_of_a_dead_process_is_stale(copied):
    code = f"import os, time; from vitdynconv.train.record import RunLock; lock = RunLock({str(copied)!r}); os.fork() or time.sleep(30); os.kill(os.getpid(), 9)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    assert parent.wait(60) and (copied/LOCK).exists()
    RunLock(copied).release()


@pytest.mark.parametrize("command", [vdc_demo, vdc_study])
@pytest.mark.parametrize("below", ["", "part"])
def test_no_other_command_writes_into_a_run(copied, capsys, command, below):
    before = sorted(copied.rglob("*"))
    assert "belongs to a training run" in line(capsys, command, out=str(copied/below))
    assert sorted(copied.rglob("*")) == before


@pytest.mark.parametrize("command, more", [(vdc_demo, {}), (vdc_study, {}), (vdc_study, dict(weights=True)), (vdc_bench, {})])
@pytest.mark.parametrize("files", [["photo.jpg"], ["history.csv"], ["report.json"], ["study.json", "runs/mine.txt"], ["rows.csv", "photo.jpg"], [".hidden"], ["album/photo.jpg"]])
def test_no_command_writes_into_a_folder_of_somebody_else(tmp_path, capsys, command, more, files):
    for name in files:
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = line(capsys, command, out=str(tmp_path), **more)
    assert "has not written" in said or "does not describe a study" in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("command, more", [(vdc_predict, dict(images=["pictures"], run="RUN")), (vdc_eval, dict(checkpoint="RUN")), (vdc_cost, dict(model="deit_tiny_patch16_224")), (vdc_equiv, {})])
@pytest.mark.parametrize("option", ["csv", "json"])
def test_a_table_never_takes_the_place_of_another_file(home, monkeypatch, capsys, command, more, option):
    monkeypatch.chdir(home)
    for target in "pictures/red/red_00.png", "/dev/null":
        before = Path(target).stat()
        assert "name another" in line(capsys, command, **more, **{option: target})
        assert Path(target).stat() == before


def test_a_step_that_fails_leaves_nothing(home, tmp_path, monkeypatch, capsys):
    def broken(*_, **__): raise RuntimeError("mat1 and mat2 do not fit")
    monkeypatch.setattr("vitdynconv.train.build.create_optimizer_v2", broken)
    assert "one step" in line(capsys, vdc_train, data=str(home/"pictures"), out=str(tmp_path/"RUN"), **SMALL)
    assert not list(tmp_path.iterdir())


# One line, exit code 2, nothing written; by kind

WRONG = {
    "missing": [
        (vdc_train, dict(out="NEW", data="nowhere")), (vdc_train, dict(out="NEW", recipe="nowhere.json")), (vdc_train, dict(resume="nowhere")),
        (vdc_train, dict()), (vdc_eval, dict()), (vdc_eval, dict(checkpoint="nowhere.ckpt")), (vdc_eval, dict(checkpoint="nowhere.safetensors")),
        (vdc_predict, dict(images=["a.jpg"])), (vdc_predict, dict(images=["nowhere.jpg"], run="RUN")), (vdc_predict, dict(images=["pictures"], run="nowhere")),
        (vdc_export, dict()), (vdc_export, dict(run="RUN", format="torch")), (vdc_export, dict(run="nowhere", format="torch", out="x")),
        (vdc_export, dict(run="RUN", out="x")), (vdc_export, dict(run="RUN", format="timm", out="x")), (vdc_predict, dict(images=["pictures"], run="empty")),
    ],
    "empty or of another kind": [
        (vdc_train, dict(out="NEW", data="empty")), (vdc_train, dict(out="NEW", data="text")), (vdc_train, dict(out="NEW", recipe="text")),
        (vdc_train, dict(out="NEW", data="one_class")), (vdc_train, dict(out="NEW", data="broken")), (vdc_eval, dict(checkpoint="text")),
        (vdc_eval, dict(checkpoint="text.safetensors")), (vdc_eval, dict(checkpoint="empty")), (vdc_predict, dict(images=["text"], run="RUN")),
        (vdc_predict, dict(images=["empty"], run="RUN")), (vdc_predict, dict(images=["pictures"], run="text")), (vdc_export, dict(run="text", format="timm", out="x")),
        (vdc_train, dict(resume="empty")), (vdc_train, dict(resume="text")), (vdc_eval, dict(checkpoint="RUN/best.safetensors", data="empty")),
    ],
    "names": [
        (vdc_train, dict(out="NEW", recipe="digit")), (vdc_train, dict(out="NEW", activation="sofmax")), (vdc_train, dict(out="NEW", model="vit_tinny")),
        (vdc_train, dict(out="NEW", opt="adamx")), (vdc_train, dict(out="NEW", kernel="dense")), (vdc_train, dict(out="NEW", log="paper")),
        (vdc_train, dict(out="NEW", set="warmth=1")), (vdc_train, dict(out="NEW", reader="nonsense/x", data="pictures", recipe="pictures")),
        (vdc_train, dict(out="NEW", pos="sideways")), (vdc_eval, dict(checkpoint="RUN/last.ckpt", weights="best")),
        (vdc_predict, dict(images=["pictures"], run="RUN", weights="best")), (vdc_export, dict(run="RUN", format="tflite", out="x")),
        (vdc_train, dict(out="NEW", model_args='{"no_such": 3}')),
    ],
    "numbers": [
        (vdc_train, dict(out="NEW", epochs="0")), (vdc_train, dict(out="NEW", epochs="many")), (vdc_train, dict(out="NEW", lr="-1")),
        (vdc_train, dict(out="NEW", seed="-1")), (vdc_train, dict(out="NEW", seed="4294967296")), (vdc_train, dict(out="NEW", log_every=0)),
        (vdc_train, dict(out="NEW", timeout=0)), (vdc_train, dict(out="NEW", img_size="2")), (vdc_train, dict(out="NEW", batch_size="9999")),
        (vdc_train, dict(out="NEW", num_heads="5")), (vdc_train, dict(out="NEW", num_classes="7", data="pictures")), (vdc_train, dict(out="NEW", in_chans="2", data="pictures")),
        (vdc_predict, dict(images=["pictures"], run="RUN", top=0)), (vdc_eval, dict(checkpoint="RUN/last.ckpt", batch_size="0")),
    ],
    "places": [
        (vdc_train, dict(out="RUN")), (vdc_train, dict(out="text")), (vdc_train, dict(out="text/NEW")), (vdc_eval, dict(checkpoint="RUN/last.ckpt", csv="nowhere/r.csv")),
        (vdc_predict, dict(images=["pictures"], run="RUN", csv="nowhere/r.csv")), (vdc_export, dict(run="RUN", format="timm", out="nowhere/x.safetensors")),
        (vdc_export, dict(run="RUN", format="hf", out="empty")), (vdc_predict, dict(images=["pictures"], run="RUN", json="empty")),
    ],
    "options that would be ignored": [
        (vdc_train, dict(resume="RUN", recipe="digits")), (vdc_train, dict(resume="RUN", epochs="3")), (vdc_train, dict(resume="RUN", set="lr=1")),
        (vdc_train, dict(resume="RUN", out="NEW")), (vdc_train, dict(resume="RUN", reader="hfds/x")), (vdc_train, dict(out="NEW", changed_data=True)),
        (vdc_eval, dict(checkpoint="RUN/model.safetensors", weights="ema")), (vdc_train, dict(out="NEW", lr="1", set="lr=2")), (vdc_train, dict(out="NEW", gpus=8)),
        (vdc_train, dict(plan=True, resume="RUN")), (vdc_train, dict(resume="auto")), (vdc_train, dict(out="RUN", resume="auto", data="pictures", epochs="3")),
        (vdc_train, dict(resume="RUN/last.ckpt", lr="1e-4")), (vdc_train, dict(resume="RUN/last.ckpt", out="NEW", depth="2", epochs="9")),
        (vdc_train, dict(resume="RUN/last.ckpt", out="NEW", recipe="digits")), (vdc_cost, dict(table=3, activation="ln")), (vdc_cost, dict(table=3, input_size=96)),
    ],
    "a folder or a file of a run": [
        (vdc_train, dict(out="RUN/part", data="pictures")), (vdc_demo, dict(out="RUN")), (vdc_study, dict(out="RUN/study")), (vdc_eval, dict(checkpoint="RUN", csv="RUN/history.csv")),
        (vdc_predict, dict(images=["pictures"], run="RUN", json="RUN/run.json")), (vdc_export, dict(run="RUN", format="timm", out="RUN/model.safetensors")),
        (vdc_export, dict(run="RUN", format="hf", out="RUN/hub")), (vdc_convert, dict(model="deit_tiny_patch16_224", out="RUN/best.safetensors")),
        (vdc_cost, dict(model="deit_tiny_patch16_224", csv="RUN/history.csv")), (vdc_bench, dict(csv="RUN/history.csv")), (vdc_bench, dict(out="RUN")),
        (vdc_equiv, dict(json="RUN/recipe.json")),
    ],
    "the other commands": [
        (vdc_demo, dict(out="text")), (vdc_demo, dict(out="NEW", epochs=-1)), (vdc_demo, dict(out="NEW", variants="soft")), (vdc_demo, dict(out="NEW", variants="")),
        (vdc_demo, dict(out="NEW", threads=0)), (vdc_demo, dict(out="NEW", seed=-1)), (vdc_study, dict(out="NEW", plan="x")), (vdc_study, dict(out="NEW", workers=-2)),
        (vdc_study, dict(out="text")), (vdc_equiv, dict(tol=-1.)), (vdc_equiv, dict(tol=float("nan"))), (vdc_equiv, dict(csv="empty")),
        (vdc_cost, dict()), (vdc_cost, dict(table=2)), (vdc_cost, dict(model="deit_tin")), (vdc_cost, dict(model="deit_tiny_patch16_224", input_size=7)),
        (vdc_cost, dict(model="deit_tiny_patch16_224", by="x")), (vdc_cost, dict(model="deit_tiny_patch16_224", activation="sofmax")),
        (vdc_cost, dict(model="deit_tiny_patch16_224", kernel="dense")), (vdc_cost, dict(model="resnet18", activation="ln")),
        (vdc_convert, dict(model="deit_tiny_patch16_224")), (vdc_convert, dict(model="deit_tiny_patch16_224", out="x.bin")), (vdc_convert, dict(model="nope", out="x.safetensors")),
        (vdc_convert, dict(model="deit_tiny_patch16_224", out="x.safetensors", checkpoint="text")), (vdc_convert, dict(model="deit_tiny_patch16_224", out="nowhere/x.safetensors")),
        (vdc_convert, dict(model="resnet18", out="x.safetensors")), (vdc_bench, dict(suite="nope")), (vdc_bench, dict(csv="empty")), (vdc_bench, dict(threads=-1)),
        (vdc_bench, dict(batch=0)), (vdc_bench, dict(seconds=-1.)), (vdc_bench, dict(device="tpu")), (vdc_bench, dict(out="text")),
        (vdc_train, dict(plan=True, gpus=0)), (vdc_train, dict(plan=True, recipe="deit_s", gpus=3)), (vdc_train, dict(plan=True, data="nowhere")),
    ],
}
# Found by trying: what users do

TOLD = {
    "vdc_train": [
        "--data pictures --out pictures/run", "--data pictures --out NEW --epochs 1 --epochs 2", "--data -dash --out NEW", "pictures --out NEW", "--data hollow --out NEW",
        "--data single --out NEW", "--data pictures/red --out NEW", "--data text --out NEW", "--data pictures --out NEW --set 'epochs=\"3'", "--data pictures --out NEW --workers 100000",
        "--data pictures --out NEW --depth 100000000", "--data pictures --out NEW --img-size 99999999999999999999", "--data pictures --out NEW --embed-dim 1e9", "--data pictures --out NEW --lr 1e300",
        "--data pictures --out NEW --epochs 1e3", "--data pictures --out NEW --epochs nan", "--data pictures --out NEW --epochs -0", "--data pictures --out NEW --mixup nan",
        "--data pictures --out NEW --rand-augment nonsense", "--data pictures --out NEW --rand-augment rand-mx", "--out NEW --crop-pct .5", "--data fashion --out NEW --random-erasing 0.5",
        "--data pictures --out NEW --model swin_tiny_patch4_window7_224", "--data pictures --out /proc/run", "--data pictures --out .", "--resume text", "--resume pictures", "--resume RUN/best.safetensors --out NEW",
        "--resume RUN/last.ckpt --out NEW --epochs 1", "--resume cut_ckpt", "--resume other_ckpt", "--resume no_data", "--resume strange", "--resume old", "--resume not_json", "--resume other_field",
        "--data sp --out sp/run", "--data pictures --out dangling", "--data pictures --out NEW --log ,", "--data pictures --out NEW --set =3", "--plan --img-size 3", "--plan --log tensorboard", "--plan --timeout 5", "--plan --log-every 3",
        "--plan --changed-data", "--data fifo.jpg --out NEW", "--resume zero.ckpt --out NEW", "--recipe zero.json --data pictures --out NEW", "--resume RUN --gpus 3", "--data pictures --out NEW --grad-accum 7",
        "--data pictures --out NEW --log tensorboard,tensorboard", "--data fashion --out NEW", "--plan --data fashion", "--data 'no  such  place' --out NEW", "--data pictures --out NEW --set 'épochs=3'",
        "--data pictures --out NEW --model vit_tïny_patch16_224", "--data pictures --out NEW --epochs ²", "--plan --data pictures --gpu-memory 0.5", "--plan --data pictures --gpus 7 --batch-size 16",
        "--data pictures --out RUN/../pictures/x", "--data 'two\nlines' --out NEW", "--resume begun --epochs 3",
    ],
    "vdc_eval": ["RUN", "--checkpoint cut", "--checkpoint foreign", "--checkpoint header.safetensors", "--checkpoint list.safetensors", "--checkpoint RUN --json /dev/null", "--checkpoint RUN --batch-size nan",
                 "--checkpoint RUN --csv pictures/red/red_00.png", "--checkpoint RUN --data single", "--checkpoint RUN --checkpoint RUN", "--run RUN --checkpoint RUN/last.ckpt", "--run empty", "--run nowhere", "--run foreign", "--run RUN --csv r.csv --json ./r.csv",
                 "--checkpoint RUN/history.csv", "--checkpoint zero.safetensors", "--run RUN --weights EMA", "--run begun", "--checkpoint begun/last.ckpt", "--run begun --weights ema", "--run RUN --data fashion"],
    "vdc_predict": ["'' --run RUN", "text --run RUN", "movie.mp4 --run RUN", "empty --run RUN", "-- -dash --run RUN", "pictures --run foreign", "pictures --run cut", "pictures --run RUN --top nan",
                    "pictures --run RUN --csv " + "a"*300 + ".csv", "pictures --run RUN/run.json", "pictures --run RUN --json pictures/red/red_00.png",
                    "fifo.jpg --run RUN", "zero.jpg --run RUN", "dangling --run RUN", "pictures nowhere --run RUN", "pictures --run RUN --csv r --json r", "pictures --run begun", "cut.gif --run RUN", "'bilder ü' --run RUN", "pictures/red/ --run pictures"],
    "vdc_export": ["--run RUN --format torch --out pictures/red/red_00.png", "--run RUN --format onnx --out x.pt2", "--run RUN --format hf --out pictures", "--run RUN --out x.onnx", "--run foreign --format torch --out x.pt2",
                   "--run RUN --format ONNX --out x.onnx", "--run RUN --format hf --out /proc/hub",
                   "--run RUN/recipe.json --format torch --out x.pt2", "--run RUN --format torch --out dangling/x.pt2", "--run RUN --format timm --out x.safetensors --weights EMA", "--run begun --format torch --out x.pt2", "--run RUN --format torch --out folder.pt2", "--run RUN --format torch --out x", "--run RUN --format hf --out text/hub"],
    "vdc_demo": ["--out pictures", "--out text/x", "--out /proc/demo", "--variants softmax,softmax", "--epochs 1e3", "--seed 99999999999999999999", "--threads 100000", "--out dangling", "--variants softmax,ünknown"],
    "vdc_study": ["--plan quick --out pictures", "--weights --plan quick", "--weights --workers 3", "--weights --out pictures", "--plan quick --out /proc/x", "--out dangling", "--plan 'quick '"],
    "vdc_bench": ["--out pictures", "--suite scaling --plot text", "--seconds nan", "--suite core --suite model", "--device cuda:9", "--threads 100000", "--out dangling", "--csv r.csv --json r.csv"],
    "vdc_cost": ["--model deit_tiny_patch16_224 --csv pictures/red/red_00.png", "--model deit_tiny_patch16_224 --input-size 1e3", "--table nan", "--model deit_tiny_patch16_224 --csv r.csv --json r.csv", "--model ''", "--model deit_tiny_patch16_224 --selection nope", "--model deit_tiny_patch16_224 --by ''"],
    "vdc_convert": ["--model deit_tiny_patch16_224 --out pictures/red/red_00.png", "--model deit_tiny_patch16_224 --out x.safetensors --checkpoint text", "--model deit_tiny_patch16_224 --out x.safetensors --checkpoint zero.ckpt",
                    "--model deit_tiny_patch16_224 --out x.safetensors --checkpoint RUN/best.safetensors", "--model '' --out x.safetensors", "--model deit_tiny_patch16_224 --out x.safetensors --class-token maybe", "--model deit_tiny_patch16_224 --out folder.safetensors"],
    "vdc_equiv": ["extra", "--csv r.csv --json r.csv", "--csv dangling/x.csv", "--tol nan", "--json pictures/red/red_00.png", "--tol 1e-400"],
}
TOLD_CASES = [(command, words) for command, lines in TOLD.items() for words in lines]


def damage(home):
    "Runs that somebody has changed by hand."
    def changed(name, file="run.json", **fields):
        run = shutil.copytree(home/"RUN", home/name)
        values = {key: value for key, value in (json.loads((run/file).read_text()) | fields).items() if value is not None}
        (run/file).write_text(json.dumps(values))
        return run
    changed("no_data", data="/nowhere/at/all"), changed("strange", classes=3), changed("old", version="99.0", fingerprint=dict(version=7)), changed("other_field", "recipe.json", warp=3)
    (changed("not_json")/"run.json").write_text("[")
    for name, file in ("cut", "best.safetensors"), ("cut_ckpt", "last.ckpt"):
        path = changed(name)/file
        path.write_bytes(path.read_bytes()[:5000])
    begun = changed("begun")
    for path in begun.iterdir():
        if path.name not in ("recipe.json", "run.json", "last.ckpt"): path.unlink()
    torch.save(torch.load(begun/"last.ckpt", weights_only=True) | dict(epoch=0, history=[]), begun/"last.ckpt")
    vdc_train(data=str(home/"pictures"), out=str(home/"DEEPER"), **SMALL | dict(depth="2", epochs="1"))
    shutil.copy(home/"DEEPER/best.safetensors", changed("foreign"))
    shutil.copy(home/"DEEPER/last.ckpt", changed("other_ckpt"))
    from safetensors.torch import save_file
    save_file(dict(w=torch.zeros(2)), home/"header.safetensors", dict(recipe='{"name": 3', run="["))
    save_file(dict(w=torch.zeros(2)), home/"list.safetensors", dict(recipe="[1]"))


@pytest.fixture(scope="module")
def told(place):
    "What the command lines name."
    damage(place)
    (place/"movie.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    write_pictures(place/"hollow")
    for folder in "hollow/empty", "fashion", "folder.pt2", "folder.safetensors": (place/folder).mkdir()
    (place/"cut.gif").write_bytes(b"GIF89a" + bytes(20))
    write_pictures(place/"single", images=1)
    for part, size in ("train", 20), ("validation", 21): write_pictures(place/"sp"/part, size=size)
    for name in "zero.ckpt", "zero.safetensors", "zero.json", "zero.jpg": (place/name).touch()
    (place/"dangling").symlink_to("no_such_place")
    os.mkfifo(place/"fifo.jpg")
    return place


@pytest.mark.parametrize("command, words", TOLD_CASES, ids=[f"{command} {words[:60]}" for command, words in TOLD_CASES])
def test_what_users_type_is_answered_in_one_line_and_leaves_nothing(told, monkeypatch, capsys, command, words):
    monkeypatch.chdir(told)
    monkeypatch.setattr(sys, "argv", [command, *shlex.split(words)])
    before = {path: path.lstat().st_mtime_ns for path in told.rglob("*") if not path.is_dir()}
    said = line(capsys, globals()[command])
    assert "Errno" not in said and "Traceback" not in said
    assert said.startswith(f"{command}: ") and len(said) < 800
    assert {path: path.lstat().st_mtime_ns for path in told.rglob("*") if not path.is_dir()} == before and not (told/"NEW").exists()


def test_a_link_that_leads_to_itself_is_passed_over(copied):
    pictures = copied.parent/"pictures"
    (pictures/"self").symlink_to("self")
    (pictures/"red/up").symlink_to("..")
    assert len(predict(load_run(copied), pictures)) == 36
    vdc_train(data=str(pictures), out=str(copied.parent/"NEW"), **SMALL | dict(epochs="1"))


# Every command that is printed works when it is pasted

def pasted(monkeypatch, text):
    "Run the command that a line ends with."
    words = shlex.split(text)
    if words[0] == "cp": return shutil.copy(*words[1:])
    assert words[0] == "vdc_train", words
    monkeypatch.setattr(sys, "argv", words)
    vdc_train()


@pytest.fixture
def odd(copied, monkeypatch):
    "A run whose folder has a name that a shell takes apart and argparse takes for an option."
    monkeypatch.chdir(copied.parent)
    shutil.move(copied, copied.parent/"-my run; $(it)'s")
    return Path("-my run; $(it)'s")


def test_the_hint_to_resume_works(odd, monkeypatch, capsys):
    from vitdynconv.train.ending import resume_command
    pasted(monkeypatch, resume_command(odd))
    monkeypatch.setattr(sys, "argv", ["vdc_train", "--data", "pictures", f"--out={odd}"])
    said = line(capsys, vdc_train)
    pasted(monkeypatch, "vdc_train " + said[said.index("--resume"):].strip())


def test_the_hint_for_a_damaged_checkpoint_works(odd, monkeypatch, capsys):
    (odd/"last.ckpt").write_bytes(b"")
    said = line(capsys, vdc_train, resume=str(odd))
    pasted(monkeypatch, said[said.index("cp "):].strip())
    vdc_train(resume=str(odd))


def test_the_hint_out_of_a_nan_works(odd, monkeypatch):
    from vitdynconv.train.ending import lower_rate_command
    recipe = json.loads((odd/"recipe.json").read_text())
    command = lower_rate_command(odd)
    assert "best-" in command or "last.ckpt" in command
    for path in odd.glob("best-*.ckpt"): path.rename(odd/"best-0001.ckpt")
    state = torch.load(odd/"last.ckpt", weights_only=True)
    state["epoch"] = 1
    torch.save(state, odd/"best-0001.ckpt")
    pasted(monkeypatch, lower_rate_command(odd))
    began = json.loads(Path(f"{odd}_lower/recipe.json").read_text())
    assert began["lr"] == pytest.approx(recipe["lr"] / 10) and Path(f"{odd}_lower/model.safetensors").exists()


def test_the_hint_out_of_a_nan_in_the_first_epoch_works(odd, monkeypatch):
    from vitdynconv.train.ending import lower_rate_command
    for path in odd.glob("best*"): path.unlink()
    for path in odd.glob("*.safetensors"): path.unlink()
    for name in "history.csv", "curves.png", "mistakes.png": (odd/name).unlink()
    state = torch.load(odd/"last.ckpt", weights_only=True)
    state["epoch"] = 0
    torch.save(state, odd/"last.ckpt")
    pasted(monkeypatch, lower_rate_command(odd))
    assert (odd/"model.safetensors").exists()


def test_the_hint_for_changed_data_works(copied, monkeypatch, capsys):
    monkeypatch.chdir(copied.parent)
    remove(copied.parent/"pictures")
    words = ["vdc_train", "--resume", "RUN", "--data", "pictures"]
    monkeypatch.setattr(sys, "argv", words)
    assert "add --changed_data" in line(capsys, vdc_train)
    pasted(monkeypatch, shlex.join([*words, "--changed_data"]))


CASES = [(kind, *case) for kind, cases in WRONG.items() for case in cases]


@pytest.fixture(scope="module")
def place(home):
    "What wrong inputs name."
    for name in ("text", "text.safetensors"): (home/name).write_text("text")
    (home/"empty").mkdir()
    write_pictures(home/"one_class", dict(red=COLOURS["red"]))
    for name in ("a", "b"):
        (home/"broken"/name).mkdir(parents=True)
        for number in range(4): (home/"broken"/name/f"{number}.png").write_text("no picture")
    return home


@pytest.mark.parametrize("kind, command, arguments", CASES, ids=[f"{kind}-{command.__name__}-{number}" for number, (kind, command, _) in enumerate(CASES)])
def test_wrong_input_is_one_line_and_leaves_nothing(place, monkeypatch, capsys, kind, command, arguments):
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    said = line(capsys, command, **arguments)
    assert said.startswith(f"{command.__name__}: ") and len(said) < 700
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before
    assert not (place/"NEW").exists()


def test_there_are_sixty_of_them_over_all_commands():
    assert set(TOLD) == {script.split("=")[0] for script in settings()["console_scripts"].split()}
    scripts = dict(script.split("=") for script in settings()["console_scripts"].split())
    assert len(CASES) >= 60 and {command.__name__ for _, command, _ in CASES} == set(scripts)


# Full disks and vanished data, while a run goes

TINY_RUN = SMALL | dict(epochs="1")
WRITES = [("recipe.json", 1), ("run.json", 1), ("last.ckpt", 1)]  # file, and at which of its writes the disk is full; more in test_signals.py


@pytest.fixture(scope="module")
def undisturbed(home):
    vdc_train(data=str(home/"pictures"), out=str(home/"UNDISTURBED"), **TINY_RUN)
    return home/"UNDISTURBED"


@pytest.mark.parametrize("name, number", WRITES)
def test_a_disk_that_is_full_at_any_write_loses_nothing(home, undisturbed, tmp_path, monkeypatch, capsys, name, number):
    "Then somebody makes room, and the run goes on to the same weights."
    from vitdynconv.tools import files
    times, replace = [], os.replace
    def full(source, target):
        if Path(target).name == name: times.append(target)
        if Path(target).name == name and len(times) == number: raise OSError(28, "No space left on device", str(target))
        return replace(source, target)
    arguments = dict(data=str(home/"pictures"), out=str(tmp_path/"RUN")) | TINY_RUN
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        said = line(capsys, vdc_train, code=1, **arguments)
    assert "no space left" in said.lower() and not list(tmp_path.rglob("*.tmp"))
    if name in ("recipe.json", "run.json"):
        assert not list(tmp_path.iterdir())
        vdc_train(**arguments)
    else:
        assert f"go on with: vdc_train --resume {tmp_path/'RUN'}" in said
        vdc_train(resume=str(tmp_path/"RUN"))
    for weights in "model.safetensors", "model_ema.safetensors":
        with safe_open(tmp_path/"RUN"/weights, "pt") as a, safe_open(undisturbed/weights, "pt") as b:
            assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in b.keys())


@pytest.mark.parametrize("part, words", [("train", "none of"), ("valid", "held-out")])
def test_pictures_that_vanish_in_a_run_end_it_in_one_line(home, tmp_path, monkeypatch, capsys, part, words):
    from fastai.basics import Callback
    from vitdynconv.train import session
    pictures = shutil.copytree(home/"pictures", tmp_path/"pictures")
    class Vanish(Callback):
        order = 90
        def after_epoch(self):
            if self.epoch: return
            loader = getattr(self.dls, part)
            for index in range(len(loader.dataset)): Path(loader.dataset.source.reader[loader.dataset.items[index]][0]).unlink()
    watchers = session.watchers
    monkeypatch.setattr(session, "watchers", lambda *words, **more: [*watchers(*words, **more), Vanish()])
    said = line(capsys, vdc_train, code=1, data=str(pictures), out=str(tmp_path/"RUN"), **SMALL)
    assert words in said and f"vdc_train --resume {tmp_path/'RUN'}" in said
    assert torch.load(tmp_path/"RUN/last.ckpt", weights_only=True)["epoch"] == 1


def test_evaluation_counts_what_it_has_seen(copied, tmp_path, capsys):
    from vitdynconv.train.build import recipe_dls
    run = load_run(copied)
    pictures = copied.parent/"pictures"
    dls = recipe_dls(run.recipe, str(pictures))
    names = [dls.valid.dataset.source.reader[index][0] for index in range(6)]
    Path(names[0]).write_text("no picture")
    arguments = dict(checkpoint=str(copied), data=str(pictures), json=str(tmp_path/"r.json"))
    vdc_eval(**arguments)
    row, = json.loads((tmp_path/"r.json").read_text())
    assert (row["images"], row["unreadable"]) == (5, 1)
    for name in names: Path(name).write_text("no picture")
    assert "can be read" in line(capsys, vdc_eval, **arguments)
