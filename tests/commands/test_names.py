"Names of classes, files and folders as the world has them, and pictures of every kind: one run, used by every command."
import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_practitioner import SMALL, line

from vitdynconv.data.folders import FolderReader, alike_words, natural_order
from vitdynconv.tools.cli import shell_words
from vitdynconv.train.ending import resume_command, without_rate
from vitdynconv.train.evaluate import vdc_eval
from vitdynconv.train.export import vdc_export
from vitdynconv.train.folder import check_out, open_run
from vitdynconv.train.mistakes import drawn_epoch
from vitdynconv.train.prediction import load_run, predict, vdc_predict
from vitdynconv.train.recipes import RECIPES
from vitdynconv.train.record import absolute_data
from vitdynconv.train.run import vdc_train

NAMES = ["$x^{", "m²", "1", "01", "Cat", "cat", "日本", "it's", "two\nlines", "long" * 40, os.fsdecode(b"caf\xe9")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A run on classes with such names, in folders with two blanks and a line break."
    home = tmp_path_factory.mktemp("home")/"my  place\nhere"
    for number, name in enumerate(NAMES):
        folder = home/"pictures"/name
        folder.mkdir(parents=True)
        for image in range(4): Image.new("RGB", (20, 20), (number * 20, image * 9, 255 - number * 20)).save(folder/f"{image} {name[:9]}.png")
    vdc_train(data=str(home/"pictures"), out=str(home/"RUN"), **SMALL | dict(epochs="1"))
    return home


def test_the_classes_have_one_order(home):
    "Whatever the seed of Python's hashes, on every process: no two names are equal."
    order = sorted(NAMES, key=natural_order)
    assert load_run(home/"RUN").classes == order and order.index("01") == order.index("1") - 1 and order.index("Cat") == order.index("cat") - 1
    assert json.loads((home/"RUN/run.json").read_text())["classes"] == order == list(FolderReader(home/"pictures").class_to_idx)
    assert alike_words(NAMES).endswith(": Cat, cat")


def test_the_run_is_whole_and_every_command_takes_it(home, tmp_path, capsys):
    assert drawn_epoch(home/"RUN/mistakes.png") == "epoch 1"
    vdc_predict(images=[str(home/"pictures")], run=str(home/"RUN"), csv=str(tmp_path/"names.csv"), json=str(tmp_path/"names.json"))
    rows = list(csv.DictReader((tmp_path/"names.csv").open(encoding="utf-8", errors="surrogateescape", newline="")))
    assert len(rows) == 44 and all(Path(row["image"]).exists() and row["class_1"] in NAMES for row in rows)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 45 and r"two\nlines" in shown
    vdc_eval(run=str(home/"RUN"))
    vdc_export(run=str(home/"RUN"), format="hf", out=str(tmp_path/"hub"))
    assert json.loads((tmp_path/"hub/config.json").read_text())["label_names"] == load_run(home/"RUN").classes
    vdc_train(resume=str(home/"RUN"))


def test_the_hint_to_go_on_can_be_pasted(home):
    words = resume_command(home/"RUN")
    assert words.isprintable()
    done = subprocess.run(["bash", "-c", words.replace("vdc_train --resume", "ls")], capture_output=True, text=True)
    assert "last.ckpt" in done.stdout, done.stderr


@pytest.mark.parametrize("name", [*NAMES, "no\xa0break", "12\u202fPM", "soft\xadhyphen", "\x85", "a\nb's \\x", "-\n"], ids=ascii)
def test_a_shell_reads_every_name_of_a_hint(name):
    "To the byte, also where Python would print a character as an escape of another kind."
    words = shell_words(f"/{name}", name)
    assert words.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True)
    assert done.stdout.split(b"\0")[:2] == [os.fsencode(f"/{name}"), os.fsencode(f"./{name}" if name[0] == "-" else name)]


def test_the_hint_out_of_a_nan_is_one_line():
    again = without_rate(shlex.join(["printf", "%s\\0", "--lr", "5", "two\nlines", "lr=3 a=no\xa0break"]))
    assert again.isprintable()
    assert subprocess.run(["bash", "-c", again], capture_output=True).stdout.split(b"\0")[:2] == [b"two\nlines", "a=no\xa0break".encode()]


def test_a_run_in_a_folder_called_fashion_is_no_data(tmp_path, monkeypatch):
    "`--data fashion --out fashion` can be given again; a folder of pictures of that name is refused."
    monkeypatch.chdir(tmp_path)
    assert absolute_data("fashion") == "fashion" and check_out("fashion", "fashion") == Path("fashion")
    open_run(Path("fashion"), RECIPES["fashion"], dict(data="fashion", reader="")).release()
    assert absolute_data("fashion") == "fashion" and check_out("fashion", "fashion") == Path("fashion")
    (tmp_path/"fashion/run.json").unlink()
    with pytest.raises(ValueError, match="write ./fashion"): absolute_data("fashion")


def test_an_answer_keeps_the_blanks_of_a_path(home, capsys):
    assert "no  such  place" in line(capsys, vdc_predict, images=["no  such  place"], run=str(home/"RUN"))
    assert r"my  place\nhere" in line(capsys, vdc_train, data=str(home/"nowhere"), out="NEW")


def test_pictures_of_every_kind(home, tmp_path, capsys):
    "A pixel, a film, a palette, sixteen bits, one that is cut, and one of another format than it says."
    grey = Image.new("L", (9, 9), 40)
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path/"pixel.png")
    grey.save(tmp_path/"film.gif", save_all=True, append_images=[grey, grey])
    grey.convert("P").save(tmp_path/"palette.png")
    Image.new("I;16", (9, 9), 40_000).save(tmp_path/"deep.png")
    Image.new("RGBA", (9, 3), (1, 2, 3, 4)).save(tmp_path/"clear.PNG")
    grey.save(tmp_path/"jpeg.png", format="jpeg")
    (tmp_path/"cut.jpg").write_bytes((tmp_path/"jpeg.png").read_bytes()[:200])
    vdc_predict(images=[str(tmp_path)], run=str(home/"RUN"), top=1)
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 8 and "1 of 7 pictures cannot be read" in said and "cut.jpg" in said
    assert all(sum(each.probabilities) == pytest.approx(1, abs=1e-5) for each in predict(load_run(home/"RUN"), tmp_path/"pixel.png", top=99))


def test_a_terminal_without_the_letters_ends_no_command(home, tmp_path):
    code = "import sys; sys.argv[0] = 'vdc_predict'; from vitdynconv.train.prediction import vdc_predict; vdc_predict()"
    done = subprocess.run([sys.executable, "-c", code, str(home/"pictures/日本"), "--run", str(home/"RUN")], capture_output=True, timeout=300,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and rb"\u65e5\u672c" in done.stdout, done.stderr
