"A signal, a full or read-only disk, while a run validates or writes: one line, and the run goes on to the same weights."
import csv
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fastai.basics import Callback
from forks import CONTEXT, run_here
from safetensors import safe_open
from test_practitioner import SMALL, line, write_pictures

from vitdynconv.tools import files
from vitdynconv.train import record, session
from vitdynconv.train.mistakes import drawn_epoch
from vitdynconv.train.record import LOCK
from vitdynconv.train.run import vdc_train

WORDS = ["--data", "pictures", "--out", "RUN", *[word for name, value in SMALL.items() for word in (f"--{name}", value)]]
ENDS = {"model.safetensors", "model_ema.safetensors"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Pictures, and a run on them that nobody disturbs."
    home = tmp_path_factory.mktemp("home")
    write_pictures(home/"pictures")
    vdc_train(data=str(home/"pictures"), out=str(home/"UNDISTURBED"), **SMALL)
    return home


def same_weights(home, run, *names):
    for name in names or ENDS:
        with safe_open(home/"UNDISTURBED"/name, "pt") as a, safe_open(run/name, "pt") as b:
            assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())


class InFirstEpoch(Callback):
    "Sends a signal in the middle of the first epoch's training, or of its validation."
    order = 90
    def __init__(self, number, training): self.number, self.when = number, training
    def before_batch(self):
        if self.training == self.when and self.epoch == 0: os.kill(os.getpid(), self.number)


def struck(moment, number, *arguments):
    "In a process of its own: the command, to which a signal comes at that moment."
    watchers, replace, times = session.watchers, os.replace, []
    def with_signal(*words, **more): return [*watchers(*words, **more), InFirstEpoch(number, moment == "training")]
    def while_written(source, target):
        if Path(target).name == moment: times.append(target)
        if len(times) == (2 if moment == "last.ckpt" else 1): os.kill(os.getpid(), number)
        return replace(source, target)
    if moment in ("training", "validation"): session.watchers = with_signal
    else: files.os.replace = while_written
    run_here(*arguments)


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
STRIKES = [(moment, name) for moment in ("validation", "last.ckpt") for name in SIGNALS]
STRIKES += [("best.safetensors", "SIGKILL"), ("history.csv", "SIGTERM"), ("model.safetensors", "SIGINT"), ("model_ema.safetensors", "SIGKILL")]


def strike(home, folder, moment, name):
    "A run in `folder` that a signal ends, and what it said."
    (folder/"pictures").symlink_to(home/"pictures")
    errors = folder/"errors"
    process = CONTEXT.Process(target=struck, args=(moment, getattr(signal, name), "vdc_train", WORDS, str(folder), str(folder/"out"), str(errors), {}))
    process.start()
    process.join(120)
    assert process.exitcode == SIGNALS[name], errors.read_text()
    return folder/"RUN", errors.read_text()


@pytest.mark.parametrize("moment, name", STRIKES)
def test_a_signal_while_a_run_validates_or_writes_loses_nothing(home, tmp_path, moment, name):
    run, said = strike(home, tmp_path, moment, name)
    state = torch.load(run/"last.ckpt", weights_only=True)
    assert state["epoch"] == {"validation": 0, "last.ckpt": 0}.get(moment, 2 if moment in ENDS else 1)
    if name != "SIGKILL":
        assert said.count("\n") == 1 and said.strip().endswith("go on with: vdc_train --resume RUN"), said
        assert not list(run.glob(".*")), "no lock and nothing half-written is left"
    vdc_train(resume=str(run))
    same_weights(home, run)
    assert not list(run.glob(".*"))


class FullDisk(Callback):
    "After an epoch, the place of one file is on a device that has no space left; what is written there fails in earnest."
    order = 74  # before the checkpoint
    def __init__(self, name, epoch): self.file_name, self.fails = name, epoch
    def after_epoch(self):
        if self.epoch + 1 != self.fails: return
        folder = self.learn.checkpoints.folder
        if self.file_name == "events": self.learn.each_epoch.writers[-1].path.unlink(missing_ok=True)
        place = self.learn.each_epoch.writers[-1].path if self.file_name == "events" else folder/f".{self.file_name}.tmp"
        place.symlink_to("/dev/full")


def rows_without_times(run):
    times = {"seconds", "images_per_second", "data_wait", "peak_memory"}
    return [{name: value for name, value in row.items() if name not in times} for row in csv.DictReader((run/"history.csv").open())]


LAST = [(name, 2) for name in ("last.ckpt", "best.safetensors", "mistakes.png", "history.csv", "curves.png", "events", "model.safetensors", "model_ema.safetensors")]


@pytest.mark.parametrize("name, epoch", [*LAST, ("best.safetensors", 1), ("mistakes.png", 1), ("events", 1)])
def test_a_disk_that_is_full_loses_no_file_for_long(home, tmp_path, monkeypatch, capsys, name, epoch):
    "One line; when the run goes on, it leaves every file that an undisturbed one leaves, also those of the epoch in which it was stopped."
    run, watchers = tmp_path/"RUN", session.watchers
    with monkeypatch.context() as patch:
        patch.setattr(session, "watchers", lambda *words, **more: [*watchers(*words, **more), FullDisk(name, epoch)])
        said = line(capsys, vdc_train, code=1, data=str(home/"pictures"), out=str(run), log="tensorboard", **SMALL)
    assert "no space left" in said.lower() and said.strip().endswith(f"go on with: vdc_train --resume {run}"), said
    for path in run.glob("events.out.*"):
        if path.is_symlink(): path.unlink()
    assert not list(run.glob(".*"))
    vdc_train(resume=str(run), log="tensorboard")
    same_weights(home, run, *ENDS, "best.safetensors")
    assert rows_without_times(run) == rows_without_times(home/"UNDISTURBED")
    assert drawn_epoch(run/"mistakes.png") == drawn_epoch(home/"UNDISTURBED/mistakes.png") != ""
    assert (run/"curves.png").exists() and (run/"last.ckpt").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert [event.step for event in EventAccumulator(str(run)).Reload().Scalars("valid_loss")] == [1, 2]


@pytest.mark.parametrize("moment, name", [*(("training", name) for name in SIGNALS), *((moment, "SIGKILL") for moment in ("run.json", "RUN", "last.ckpt"))])
def test_a_run_without_an_epoch_never_blocks_the_same_command(home, tmp_path, moment, name):
    "Whatever ends it: while its folder is made, in its first epoch, or while that epoch's checkpoint is written."
    run, _ = strike(home, tmp_path, moment, name)
    assert run.exists() == (moment not in ("run.json", "RUN"))
    if run.exists(): assert torch.load(run/"last.ckpt", weights_only=True)["epoch"] == 0 and not (run/"history.csv").exists()
    vdc_train(data=str(home/"pictures"), out=str(run), **SMALL)
    same_weights(home, run)
    assert not list(run.glob(".*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number, words", [(28, "disk is full|No space left"), (30, "[Rr]ead-only file system"), (122, "[Dd]isk quota")])
def test_a_disk_that_takes_nothing_more_leaves_a_finished_epoch_as_it_is(home, tmp_path, monkeypatch, capsys, number, words):
    "Full, read-only or over the quota, when a run goes on."
    run = shutil.copytree(home/"UNDISTURBED", tmp_path/"RUN")
    state = torch.load(run/"last.ckpt", weights_only=True)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    def refused(path, mode="r", *more, **options):
        if set(mode) & set("wax+"): raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *more, **options)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", refused, raising=False)
        if number == 30: patch.setattr(record, "open", refused, raising=False)
        with pytest.raises(SystemExit) as end: vdc_train(resume=str(run))
    said = capsys.readouterr().err
    assert end.value.code in (1, 2) and said.count("\n") == 1, said
    assert re.search(words, said), said
    assert state["epoch"] == 2 and {path.name: path.read_bytes() for path in run.iterdir()} == before
    vdc_train(resume=str(run))


@pytest.mark.parametrize("name", [LOCK, "last.ckpt", "recipe.json", "run.json"])
def test_a_folder_in_the_place_of_a_file_of_a_run(home, tmp_path, capsys, name):
    run = shutil.copytree(home/"UNDISTURBED", tmp_path/"RUN")
    (run/name).unlink(missing_ok=True)
    (run/name).mkdir()
    before = sorted(run.iterdir())
    assert name in line(capsys, vdc_train, resume=str(run))
    assert sorted(run.iterdir()) == before
