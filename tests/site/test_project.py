"The checkout: what is made from the notebooks, the workflows, the scripts behind make. (Pages: test_notebooks.py; the site: test_site.py.)"
import importlib.util, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


def cells(path, kind=None):
    "The cells of a notebook, of one kind or of all."
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def caretaker(*args, root=ROOT):
    "Run .ci/notebooks.py."
    return subprocess.run([sys.executable, root/".ci/notebooks.py", *args], capture_output=True, text=True, timeout=300)


def test_styled_tables_have_numbers_for_names():
    "pandas draws another name at each run, so that pages would differ where nothing has changed."
    spec = importlib.util.spec_from_file_location("caretaker", ROOT/".ci/notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outputs = [{"data": {"text/html": pd.DataFrame({"a": [value]}).style.set_properties(color="red").to_html().splitlines(True)}} for value in (1, 2)]
    names = [re.search(r'id="(T_\w{5})"', "".join(o["data"]["text/html"]))[1] for o in outputs]
    module.number_tables({"cells": [{"outputs": outputs}]})
    for number, (name, output) in enumerate(zip(names, outputs)):
        page = "".join(output["data"]["text/html"])
        assert name not in page and f'<table id="T_{number:05}">' in page and f"#T_{number:05}_row0_col0" in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(NBS)))
def test_stored_tables_have_numbers_for_names(path):
    pages = "".join("".join(o.get("data", {}).get("text/html", "")) for c in cells(path, "code") for o in c["outputs"])
    assert not [name for name in re.findall(r'<table id="T_([0-9a-f]{5})"', pages) if not name.isdigit() or int(name) > 99]


# Commands

def test_workflows_run_the_same_commands():
    steps = lambda name: [s for job in yaml.safe_load((ROOT/f".github/workflows/{name}").read_text())["jobs"].values() for s in job["steps"]]
    assert ".ci/run" in [s.get("run") for s in steps("tests.yml")]
    assert os.access(ROOT/".ci/run", os.X_OK) and "make test" in (ROOT/".ci/run").read_text()
    assert "make docs" in [s.get("run") for s in steps("docs.yml")]
    quarto, = (s["with"]["version"] for s in steps("docs.yml") if "quarto" in s.get("uses", ""))
    assert re.fullmatch(r"\d+\.\d+\.\d+", str(quarto))


def test_make_calls_what_exists():
    text = (ROOT/"Makefile").read_text()
    scripts = (ROOT/"settings.ini").read_text()
    for command in re.findall(r"\$\(BIN\)/(vdc_\w+)", text): assert f"{command}=" in scripts
    for script in re.findall(r"\.ci/[\w.]+", text): assert (ROOT/script).exists(), script
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split(): assert f"make {target} - " in listed


# What is made from the notebooks

def test_one_module_one_notebook():
    exported = {}
    for path in NOTEBOOKS:
        names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join("".join(c["source"]) for c in cells(path, "code")), re.M)
        for name in names: exported[name] = path
        if names: assert names == [".".join([*path.relative_to(NBS).parts[:-1], re.sub(r"^\d+_", "", path.stem)])]
    files = [p.relative_to(ROOT/"vitdynconv").with_suffix("") for p in (ROOT/"vitdynconv").rglob("*.py")]
    modules = {".".join(p.parts) for p in files if p.stem not in ("__init__", "_modidx")}
    assert modules == set(exported)


def test_readme_is_the_index():
    done = caretaker("check", "readme")
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_unfinished_or_tied_to_one_machine():
    files = [*NOTEBOOKS, *(ROOT/"vitdynconv").rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.yml"), ROOT/"Makefile", *ROOT.glob(".ci/*")]
    unfinished, machine = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b"), re.compile(r"(?<![\w.~/:@-])/(root|home|Users|work|tmp)/\w")
    for path in files:
        text = re.sub(r"[\w+/=]{200,}", "", path.read_text())  # pictures, as base64
        for word in unfinished, machine:
            found = word.search(text)
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


# The scripts behind make, on a small project of their own

@pytest.fixture
def project(tmp_path):
    "A copy of the project with one small notebook beside the index."
    for name in ".ci", "nbs", "vitdynconv": (tmp_path/name).mkdir()
    for name in "settings.ini", "setup.py", "constraints.txt", ".ci/notebooks.py", ".ci/tests.py", ".ci/share.py", ".ci/venv", "nbs/index.ipynb", "nbs/_quarto.yml":
        shutil.copy(ROOT/name, tmp_path/name)
    write_notebook(tmp_path/"nbs/00_one.ipynb", ["#| default_exp one", "#| export\ndef one(): return 1", "print(one() + 1)"])
    (tmp_path/"_quarto.yml").write_text("website: {sidebar: {contents: [index.ipynb, 00_one.ipynb]}}")
    subprocess.run([Path(sys.executable).parent/"nbdev_export"], cwd=tmp_path, check=True)
    return tmp_path


def write_notebook(path, sources, output=None):
    "A notebook as nbdev leaves it; `output` is stored in every cell."
    stored = [] if output is None else [{"name": "stdout", "output_type": "stream", "text": [output]}]
    nb = {"cells": [{"cell_type": "markdown", "id": "t", "metadata": {}, "source": ["# One\n", "> line"]}] + [
              {"cell_type": "code", "execution_count": None, "id": f"c{i}", "metadata": {}, "outputs": stored, "source": s.splitlines(True)}
              for i, s in enumerate(sources)],
          "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(nb, indent=1, sort_keys=True) + "\n")


STALE = {  # what is checked -> the file, how it becomes stale, what mends it
    "export": ("vitdynconv/one.py", lambda text: text.replace("return 1", "return 2"), "nbdev_export"),
    "clean": ("nbs/00_one.ipynb", lambda text: text.replace('"execution_count": null', '"execution_count": 7'), "nbdev_clean"),
    "readme": ("README.md", lambda text: text + "more\n", "make readme"),
}


@pytest.mark.parametrize("check", STALE)
def test_check_tells_what_is_stale_and_changes_nothing(project, check):
    name, spoiled, remedy = STALE[check]
    path = project/name
    if check == "readme": shutil.copy(ROOT/name, path)
    else: assert caretaker("check", check, root=project).returncode == 0
    text = path.read_text(encoding="utf-8")
    path.write_text(spoiled(text), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    before = path.read_bytes()
    done = caretaker("check", check, root=project)
    assert done.returncode == 1 and name in done.stderr and remedy in done.stderr
    assert path.read_bytes() == before


def test_readme_shows_figures_and_turns_links(project):
    "Links lead from nbs/ to the root, figures go to a folder of their own, code stays as it is."
    figure = {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": ["<svg/>"]}}
    nb = json.loads((project/"nbs/index.ipynb").read_text())
    nb["cells"] = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# T\n", "> d"]},
                   {"cell_type": "markdown", "id": "b", "metadata": {}, "source": ["[a](00_one.ipynb) [b](../LICENSE) [c](https://example.org)"]},
                   {"cell_type": "code", "id": "c", "metadata": {}, "execution_count": None, "outputs": [figure], "source": ["f[0](x)"]}]
    (project/"nbs/index.ipynb").write_text(json.dumps(nb))
    assert caretaker("readme", root=project).returncode == 0
    text = (project/"README.md").read_text()
    assert "# T\n\n> d\n\n[a](nbs/00_one.ipynb) [b](LICENSE) [c](https://example.org)\n\n```python\nf[0](x)\n```" in text
    figure, = (project/"README_files").iterdir()
    assert f"README_files/{figure.name}" in text and figure.read_text() == "<svg/>"


def test_run_stores_outputs_and_leaves_flagged_cells_alone(project):
    path = project/"nbs/00_one.ipynb"
    write_notebook(path, ["print(1 + 1)", "#| cuda\n#| eval: false\nprint('needs a GPU')", "1/2"], output="stored\n")
    done = caretaker("run", str(path), root=project)
    assert done.returncode == 0, done.stdout + done.stderr
    ran, flagged, last = cells(path, "code")
    assert ran["outputs"][0]["text"] == ["2\n"] and flagged["outputs"][0]["text"] == ["stored\n"]
    assert last["outputs"][0]["data"] == {"text/plain": ["0.5"]}
    assert caretaker("check", "clean", root=project).returncode == 0


@pytest.mark.parametrize("cell, words", [("1/0", "ZeroDivisionError"), ("import os; os._exit(3)", "Kernel died")])
def test_run_stops_at_an_error_and_keeps_the_notebook(project, cell, words):
    path = project/"nbs/00_one.ipynb"
    write_notebook(path, ["print(1)", cell])
    before = path.read_bytes()
    done = caretaker("run", str(path), root=project)
    assert done.returncode == 1 and words in done.stderr and "00_one.ipynb failed" in done.stderr and "Traceback (most recent call last):\n  File" not in done.stderr
    assert path.read_bytes() == before and not list(project.rglob("*.tmp"))


WAITS = """import pathlib, time
pathlib.Path('{mine}.here').touch()
end = time.time() + 120
while not pathlib.Path('{other}.here').exists():
    assert time.time() < end, 'alone'
    time.sleep(.1)
print('met')"""


def test_run_takes_notebooks_side_by_side(project):
    "Each of two notebooks waits for the other: one after the other, the first would never end."
    paths = [project/"nbs/00_one.ipynb", project/"nbs/01_two.ipynb"]
    for path, mine, other in zip(paths, "ab", "ba"): write_notebook(path, [WAITS.format(mine=mine, other=other)])
    done = caretaker("run", "--workers", "2", *paths, root=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [cells(path, "code")[0]["outputs"][0]["text"] for path in paths] == [["met\n"]]*2
    assert all(f"nbs/{path.name} " in done.stdout for path in paths)


COLAB = """website: {sidebar: {contents: [index.ipynb, 00_one.ipynb]}}
format:
  html:
    include-after-body:
      - text: |
          const notebooks = [
            // notebooks: begin
            'gone',
            // notebooks: end
          ]
"""


def test_the_list_of_notebooks_is_written_and_checked(project):
    path = project/"_quarto.yml"
    path.write_text(COLAB)
    done = caretaker("check", "colab", root=project)
    assert done.returncode == 1 and "_quarto.yml" in done.stderr and "notebooks.py colab" in done.stderr and path.read_text() == COLAB
    assert caretaker("colab", root=project).returncode == 0
    assert path.read_text() == COLAB.replace("            'gone',\n", "            'index',\n            '00_one',\n")
    assert caretaker("check", "colab", root=project).returncode == 0


def everything(project, *words):
    "Run .ci/tests.py, the whole of `make test`."
    return subprocess.run([sys.executable, project/".ci/tests.py", *words], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": str(project)})


def test_make_test_shows_progress_times_and_the_count(project):
    (project/"_quarto.yml").write_text(COLAB)
    (project/"tests").mkdir()
    shutil.copy(ROOT/"pytest.ini", project)
    (project/"tests/test_one.py").write_text("import pytest\ndef test_a(): pass\ndef test_b(): pass\n@pytest.mark.slow\ndef test_c(): pass\n")
    for action in "readme", "colab": assert caretaker(action, root=project).returncode == 0
    write_notebook(project/"nbs/index.ipynb", ["print(1)"])
    assert caretaker("readme", root=project).returncode == 0
    done = everything(project)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line[:3] for line in lines[:5]] == ["1/6", "2/6", "3/6", "4/6", "5/6"] and all(re.search(r"\(\d+ s\)$", line) for line in lines[:4])
    assert any(re.match(r"notebooks +\d+ s \| .*00_one.ipynb", line) for line in lines) and any(re.match(r"tests [12] +\d+ s \| ", line) for line in lines)
    assert re.match(r"2 passed, 1 deselected in ", lines[-1])


NOTEBOOKS_PASS = "#!/bin/sh\necho 00_one.ipynb\n"
MANY = """
import os, time
from pathlib import Path
import pytest
def note(name):
    with Path("ran.txt").open("a") as file: file.write(f"{{name}} {{os.getpid()}}\\n")
    time.sleep(.05)
@pytest.mark.parametrize("number", range(2))
def test_some(number): note(f"{name}-{{number}}")
def test_site(site): note("site")
@pytest.mark.slow
def test_slow(): note("{name}-slow")
"""


@pytest.fixture
def shared(tmp_path):
    "A project with eight test files and no notebooks: a function that runs all of it, with two lanes."
    for folder in ".ci", "tests": (tmp_path/folder).mkdir()
    for name in ".ci/tests.py", ".ci/share.py", "pytest.ini": shutil.copy(ROOT/name, tmp_path/name)
    (tmp_path/"tests/conftest.py").write_text("import pytest\n@pytest.fixture(scope='session')\ndef site(): return 1\n")
    for name in "abcdefgh": (tmp_path/f"tests/test_{name}.py").write_text(MANY.format(name=name))
    (tmp_path/"nbdev_test").write_text(NOTEBOOKS_PASS)
    (tmp_path/"nbdev_test").chmod(0o755)
    code = ("import sys; sys.path.insert(0, '.ci'); import tests; from pathlib import Path; tests.BIN = Path.cwd(); "
            "tests.cores = lambda: int(sys.argv[1]); sys.exit(tests.run_all(len(sys.argv) > 2))")
    def run(*words, cores=2):
        return subprocess.run([sys.executable, "-c", code, str(cores), *words], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    run.folder = tmp_path
    return run


def ran(shared):
    "Test -> the processes that ran it."
    found = {}
    for line in (shared.folder/"ran.txt").read_text().splitlines(): found.setdefault(line.split()[0], []).append(line.split()[1])
    return found


@pytest.mark.parametrize("cores, slow", [(2, []), (2, ["slow"]), (1, [])])
def test_two_processes_share_the_tests_and_run_each_once(shared, cores, slow):
    done = shared(*slow, cores=cores)
    assert done.returncode == 0, done.stdout + done.stderr
    found, lines = ran(shared), done.stdout.splitlines()
    site = found.pop("site")
    assert len(site) == 8 and len(set(site)) == 1  # the fixture is made once
    assert set(found) == {f"{name}-{number}" for name in "abcdefgh" for number in ["0", "1"] + slow}
    assert all(len(processes) == 1 for processes in found.values())
    assert len({process for processes in found.values() for process in processes}) == cores
    assert all(any(re.match(rf"tests [12] +\d+ s \| tests/test_{name}.py: \d tests in \d+ s \(\d of 9 taken\)$", line) for line in lines) for name in "abcdefgh")
    assert re.match(r"32 passed in \d+ s$" if slow else r"24 passed, 8 deselected in \d+ s$", lines[-1])
    assert "notebooks: passed in" in done.stdout and "tests: passed in" in done.stdout


BREAK = {  # what one file does -> what is said at the end
    "def test_red(): assert False": (r"1 failed, 24 passed, 8 deselected in", "FAILED tests/test_e.py::test_red"),
    "import nowhere": (r".* not run in", "ended with code 2"),
    "def test_red(): os._exit(0)": (r".* not run in", "tests: FAILED"),
    "def test_red(): os.kill(os.getpid(), 9)": (r".* not run in", "ended with code -9"),
}


@pytest.mark.parametrize("words", BREAK)
def test_a_red_test_and_a_process_that_dies_fail_everything(shared, words):
    with (shared.folder/"tests/test_e.py").open("a") as file: file.write(f"\n{words}\n")
    done = shared()
    last, said = BREAK[words]
    assert done.returncode == 1 and "tests: FAILED" in done.stdout and said in done.stdout, done.stdout + done.stderr
    assert re.match(last, done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize("script", ["exit 1", "echo No files were eligible for testing"])
def test_notebooks_that_fail_fail_everything(shared, script):
    (shared.folder/"nbdev_test").write_text(f"#!/bin/sh\n{script}\n")
    done = shared()
    assert done.returncode == 1 and "notebooks: FAILED" in done.stdout and "tests: passed" in done.stdout


def test_the_long_files_that_go_first_are_there():
    spec = importlib.util.spec_from_file_location("share", ROOT/".ci/share.py")
    share = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(share)
    assert set(share.LONG[1:]) <= {path.name for path in (ROOT/"tests").rglob("test_*.py")}


def test_continuous_integration_runs_the_slow_tests_too():
    assert "make test SLOW=1" in (ROOT/".ci/run").read_text() and "--slow" in (ROOT/"Makefile").read_text()
    import configparser
    ini = configparser.ConfigParser()
    ini.read(ROOT/"pytest.ini")
    assert '-m "not slow"' in ini["pytest"]["addopts"]


WITHOUT = """
import pytest
from conftest import require
def test_browser(): require("chromium")
def test_script(): require("node")
def test_package(): pytest.importorskip("a_package_that_is_not_there")
"""


@pytest.mark.parametrize("ci", ["", "true"])
def test_what_is_missing_fails_continuous_integration_and_is_skipped_elsewhere(tmp_path, ci):
    for name in "pytest.ini", "tests/conftest.py": (tmp_path/name).parent.mkdir(exist_ok=True), shutil.copy(ROOT/name, tmp_path/name)
    (tmp_path/"tests/test_without.py").write_text(WITHOUT)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"CI": ci, "PATH": str(tmp_path)})
    assert done.stdout.splitlines()[-1].startswith("3 failed" if ci else "3 skipped"), done.stdout


def build(project, **env):
    "Run .ci/venv with no way to the package index."
    return subprocess.run(["bash", project/".ci/venv"], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""} | env)


def test_no_environment_without_a_python(project):
    done = build(project, PYTHON="python-that-is-not")
    assert done.returncode == 1 and "python-that-is-not" in done.stderr and not (project/".venv").exists()
    old = project/"old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    done = build(project, PYTHON=str(old))
    assert done.returncode == 1 and "Python 3.8.1" in done.stderr and "3.10" in done.stderr and not (project/".venv").exists()


def test_a_failed_install_is_not_taken_for_an_environment(project):
    done = build(project)
    assert done.returncode == 1 and "No matching distribution" in done.stderr
    assert not (project/".venv/.ready").exists() and (project/".venv/.unfinished").exists()


def test_no_line_is_longer_than_a_page():
    "120 characters; nbdev alone decides where the list of a module's names is broken."
    wide = []
    for path in (ROOT/"vitdynconv").rglob("*.py"):
        if path.stem == "_modidx": continue
        text = re.sub(r"^__all__ = \[.*?\]$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        wide += [f"{path.relative_to(ROOT)}: {line}" for line in text.splitlines() if len(line) > 120]
    assert not wide, wide
