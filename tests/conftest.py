"What all tests share."
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


def pytest_configure(config):
    "One thread: sums come out in one order, and two halves of the tests can run side by side."
    os.environ.setdefault("OMP_NUM_THREADS", "1")


PROGRAMS = {  # what a test asks for -> the commands that do, and the Debian package
    "node": (["node"], "nodejs"),
    "chromium": (["chromium", "chromium-browser", "google-chrome", "chrome"], "chromium"),
}


def require(program):
    "The path of a program. Without it a test is skipped on a developer's machine, and fails in continuous integration."
    commands, package = PROGRAMS[program]
    for command in commands:
        if shutil.which(command): return shutil.which(command)
    reason = f"needs {program}; on Debian: apt install {package}"
    if IN_CI: pytest.fail(f"{reason} (in continuous integration nothing may be skipped for want of it)")
    pytest.skip(reason)


def pytest_collection_modifyitems(items):
    "Tests that are marked cuda are skipped where there is no GPU."
    if not any(item.get_closest_marker("cuda") for item in items): return
    import torch
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("cuda"): item.add_marker(pytest.mark.skip(reason="needs a GPU"))


MISSING = re.compile(r"could not import '(?!triton)|needs the \S+ package")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "In continuous integration a package that is missing is a failure, not a reason to skip."
    report = yield
    if IN_CI and report.skipped and isinstance(report.longrepr, tuple) and MISSING.search(report.longrepr[2]):
        report.outcome, report.longrepr = "failed", f"skipped for want of a package: {report.longrepr[2]}"
    return report


def settings():
    "The section of settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def notebooks():
    "Every notebook of the project, by path."
    hidden = lambda path: any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
    return sorted(path for path in NBS.rglob("*.ipynb") if not hidden(path))


def cells(path, kind=None):
    "The cells of a notebook, of one kind or of all."
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if kind in (None, cell["cell_type"])]


@pytest.fixture(scope="session")
def root():
    "The checkout."
    return ROOT


@pytest.fixture
def run_command(tmp_path):
    "Run a console command of the library by name, in a folder of its own."
    scripts = dict(script.split("=") for script in settings()["console_scripts"].split())

    def run(name, *words, timeout=300, **env):
        module, function = scripts[name].split(":")
        code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; sys.exit({function}())"
        return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
                              timeout=timeout, env=os.environ | env)
    return run


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The project's pages as nbdev processes them for Quarto: the folder _proc."
    folder = tmp_path_factory.mktemp("site")
    for name in "nbs", "vitdynconv":
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.tmp"))
    for name in "settings.ini", "_quarto.yml": shutil.copy(ROOT / name, folder)
    code = "from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; refresh_quarto_yml(); proc_nbs(n_workers=0)"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return folder / "_proc"


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    "Cluttered digits as JPEG files: 20 of each class and split."
    from vitdynconv.data import cluttered_digits_dls, write_imagefolder
    return write_imagefolder(cluttered_digits_dls(size=48, copies=1), tmp_path_factory.mktemp("images") / "digits", per_class=20)
