"The frame of the commands: what counts as an answer to the user, and how it is given."
import errno
import io
import os
import pickle
import subprocess
import sys
import zipfile
from typing import Literal

import pytest

from vitdynconv.tools import cli

SCRIPT = """
import sys
from vitdynconv.tools.cli import command
@command(go_on='go on with --resume run')
def example(
    size: int = 8, # of it
):
    "An example."
    {body}
"""


def run(tmp_path, body, *words, **env):
    "A command with this body, run as a script."
    script = tmp_path / "example.py"
    script.write_text(SCRIPT.format(body=body))
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=120, env=os.environ | env)


DISK_FULL = "raise OSError(28, 'No space left on device', 'last.ckpt')"
ANSWERS = {  # body -> exit code, part of the one line
    "open('/no/such/file')": (2, "/no/such/file: no such file or directory"),
    "raise ValueError('--size 3 is too\\nsmall; give 4')": (2, "--size 3 is too small; give 4"),
    "raise KeyboardInterrupt": (130, "interrupted; go on with --resume run"),
    "raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed.')": (1, "another process died"),
    "import no_such_package.part": (2, "pip install no_such_package"),
    "import pickle; pickle.loads(b'')": (2, "empty, damaged or of another format"),
    "import pickle; pickle.loads(b'text')": (2, "empty, damaged or of another format"),
    "import io, zipfile; zipfile.ZipFile(io.BytesIO(b'text'))": (2, "empty, damaged or of another format"),
    "import io, tarfile; tarfile.open(fileobj=io.BytesIO(b'text'))": (2, "empty, damaged or of another format"),
    "import json; json.loads('')": (2, "Expecting value"),
    DISK_FULL: (1, "the disk is full (last.ckpt: no space left on device); free some space; go on with --resume run"),
    "raise MemoryError": (1, "out of memory"),
}


@pytest.mark.parametrize("body", ANSWERS)
def test_an_answer_is_one_line_and_a_code(tmp_path, body):
    code, part = ANSWERS[body]
    done = run(tmp_path, body)
    assert done.returncode == code and not done.stdout
    assert done.stderr.startswith("example: ") and done.stderr.count("\n") == 1 and part in done.stderr


@pytest.mark.parametrize("body", ["{}['x']", "1 / 0", "raise RuntimeError('shapes')", "raise TypeError('x')", "import vitdynconv.no_such_part"])
def test_our_own_mistakes_keep_their_traceback(tmp_path, body):
    done = run(tmp_path, body)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_the_traceback_of_an_answer_can_be_asked_for(tmp_path):
    done = run(tmp_path, "raise ValueError('bad')", VITDYNCONV_TRACEBACK="1")
    assert "Traceback" in done.stderr and done.stderr.strip().endswith("ValueError: bad")


def test_only_the_first_process_of_a_machine_speaks(tmp_path):
    done = run(tmp_path, "raise ValueError('bad')", LOCAL_RANK="1")
    assert done.returncode == 2 and not done.stderr


def test_a_closed_pipe_is_no_error(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(SCRIPT.format(body="for i in range(200_000): print(i)"))
    done = subprocess.run(f"{sys.executable} {script} | head -1", shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n" and not done.stderr


def test_the_safetensors_library_says_its_error_by_its_own_class(tmp_path):
    (tmp_path / "weights.safetensors").write_text("text")
    done = run(tmp_path, f"from safetensors import safe_open; safe_open(r'{tmp_path}/weights.safetensors', 'np')")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_an_error_of_a_worker_process_is_told_by_its_last_line():
    import torch

    class Broken(torch.utils.data.Dataset):
        def __len__(self): return 1
        def __getitem__(self, i): raise ValueError("images/a.png is empty")

    with pytest.raises(ValueError) as caught: list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert cli.explain_error(caught.value) == ("ValueError: images/a.png is empty", 2)


def test_torch_says_a_full_disk_in_its_own_words():
    import torch

    class Full(io.BytesIO):
        def write(self, data): raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises((OSError, RuntimeError)) as caught: torch.save(torch.zeros(100_000), Full())
    message, code = cli.explain_error(caught.value, "go on with --resume run")
    assert code == 1 and message.startswith("the disk is full") and message.endswith("go on with --resume run")


def shape(
    side: int,                                    # pixels of a side
    mode: Literal["grey", "rgb"] = "rgb",         # kind, 100% of it
    rate: float = None,                           # of learning
    amp: bool = False,                            # half precision
    shuffle: bool = True,                         # another order
    files: list[str] = (),                        # any number of files
): "A function to make a parser for."


@pytest.mark.parametrize("words, changed", [
    (["8"], {}), (["8", "--mode", "grey"], dict(mode="grey")), (["8", "--rate=1e-3"], dict(rate=.001)),
    (["8", "--amp"], dict(amp=True)), (["8", "--no-shuffle"], dict(shuffle=False)), (["8", "--files", "a_b", "c"], dict(files=["a_b", "c"])),
])
def test_words_become_values(words, changed):
    plain = dict(side=8, mode="rgb", rate=None, amp=False, shuffle=True, files=())
    assert cli.CommandParser("shape", shape.__doc__, cli.options_of(shape)).parse(words) == plain | changed


@pytest.mark.parametrize("words", [
    [], ["x"], ["8", "--mode", "bw"], ["8", "--rate", "nan"], ["8", "--rate", "inf"], ["8", "--moode", "grey"], ["8", "9"],
    ["8", "--rat", "1"], ["8", "--amp=1"], ["8.5"], ["8", "--rate"],
])
def test_wrong_words_are_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as end: cli.CommandParser("shape", shape.__doc__, cli.options_of(shape)).parse(words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("shape: ") and said.count("\n") == 1


@pytest.mark.parametrize("option, suggestion", [("--side-length", None), ("--moode", "--mode"), ("--shufle", "--shuffle")])
def test_the_closest_option_is_suggested(option, suggestion, capsys):
    with pytest.raises(SystemExit): cli.CommandParser("shape", shape.__doc__, cli.options_of(shape)).parse(["8", option])
    said = capsys.readouterr().err
    assert f"there is no option {option}" in said and (suggestion is None or f"did you mean {suggestion}?" in said)


def test_more_options_arrive_as_keywords(monkeypatch):
    seen = []

    @cli.command(more_options=[cli.Option("lr", float, None, "learning rate")])
    def train(out: str = "", **settings): seen.append((out, settings))

    monkeypatch.setattr(sys, "argv", ["/bin/train", "--lr", "0.1", "--out", "run_1"])
    train()
    train(out="b", lr=3)
    assert seen == [("run_1", dict(lr=.1)), ("b", dict(lr=3))]


def test_called_from_other_code_a_command_is_a_function(monkeypatch):
    @cli.command
    def double(size: int = 4): return 2 * size

    monkeypatch.setattr(sys, "argv", ["/bin/other", "--size", "9"])
    assert double() == 8 and double(3) == 6 and double(size=5) == 10


def test_tables_align_and_hide_nothing():
    rows = [dict(name="a", count=1234567, part=.25), dict(name="bcd", count=None, part=1e-9)]
    assert cli.format_table(rows).splitlines() == [
        "name      count      part", "a     1,234,567      0.25", "bcd              1.00e-09"]
