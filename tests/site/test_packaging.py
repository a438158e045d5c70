"What a user gets with pip install, and what a newcomer gets with a clone."
import importlib, json, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
config = ConfigParser(delimiters=["="])
config.read(ROOT/"settings.ini", encoding="utf-8")
CONFIG = config["DEFAULT"]
SCRIPTS = dict(script.split("=") for script in CONFIG["console_scripts"].split())
MODULES = sorted(".".join(p.relative_to(ROOT/"vitdynconv").with_suffix("").parts) for p in (ROOT/"vitdynconv").rglob("*.py") if not p.stem.startswith("_"))
DERIVATION = [name for name in MODULES if name.startswith(("layers.", "framework."))]


def python(code):
    "Run code in a fresh interpreter, away from the checkout."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the tree, so that nothing is left in it."
    tmp = tmp_path_factory.mktemp("wheel")
    for name in "settings.ini setup.py MANIFEST.in README.md LICENSE".split(): shutil.copy(ROOT/name, tmp)
    for name in "vitdynconv", "nbs", "tests": shutil.copytree(ROOT/name, tmp/name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
                           "--wheel-dir", tmp/"dist", tmp], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built, = (tmp/"dist").iterdir()
    with zipfile.ZipFile(built) as z: yield {name: z.read(name).decode(errors="replace") for name in z.namelist()}


def in_wheel(wheel, name):
    "The text of a metadata file of the wheel."
    return next(text for path, text in wheel.items() if path.endswith(f".dist-info/{name}"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"vitdynconv-{CONFIG['version']}.dist-info"
    code = {p for p in wheel if not p.startswith(info)}
    ours = [*(ROOT/"vitdynconv").rglob("*.py"), *(ROOT/"vitdynconv/bundled").iterdir()]
    assert code == {str(p.relative_to(ROOT)) for p in ours}
    assert "vitdynconv/bundled/LICENSE-fashion-mnist.txt" in code


def test_wheel_says_what_settings_say(wheel):
    from email import message_from_string
    meta = message_from_string(in_wheel(wheel, "METADATA"))
    assert (meta["Name"], meta["Version"]) == (CONFIG["lib_name"], CONFIG["version"])
    assert meta["Summary"] == CONFIG["description"]
    assert meta["Requires-Python"] == ">=" + CONFIG["min_python"]
    required = [Requirement(r) for r in meta.get_all("Requires-Dist")]
    plain = {str(r) for r in required if not r.marker}
    assert plain == {str(Requirement(r)) for r in CONFIG["requirements"].split()}
    assert {r.name for r in required if r.marker} == {Requirement(r).name for r in CONFIG["dev_requirements"].split()}
    page, whole = meta.get_payload(), CONFIG["git_url"]
    assert page.replace(f"]({whole}/raw/main/nbs/", "](nbs/").replace(f"]({whole}/blob/main/nbs/", "](nbs/") == (ROOT/"README.md").read_text()
    assert "](nbs/" not in page and f"]({whole}/raw/main/nbs/images/block.png)" in page      # a package index does not have our folders


def test_wheel_installs_the_commands(wheel):
    points = ConfigParser(delimiters=["="])
    points.optionxform = str
    points.read_string(in_wheel(wheel, "entry_points.txt"))
    assert {k: v.replace(" ", "") for k, v in points["console_scripts"].items()} == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_can_be_imported(script):
    module, function = SCRIPTS[script].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.fixture(scope="module")
def loaded():
    "What is loaded after importing `layers.attention`, then the rest of the derivation, then all of it, in one process without a network."
    stages = [["layers.attention"], DERIVATION, MODULES]
    done = python(f"""
import sys, json, importlib
def no_network(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"): raise OSError(f"network at import: {{event}} {{args[1:]}}")
sys.addaudithook(no_network)
try: __import__("socket").create_connection(("localhost", 9))
except OSError as e: assert "network at import" in str(e)  # the guard itself
for names in {stages}:
    for name in names: importlib.import_module("vitdynconv." + name)
    print(json.dumps(sorted(sys.modules)))
""")
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_importing_attention_is_light(loaded):
    heavy = {"fastai", "matplotlib", "pandas", "sklearn", "fvcore", "accelerate", "nbdev", "IPython"}
    assert "timm" in loaded[0] and not loaded[0] & heavy


def test_derivation_does_not_know_the_trainer(loaded):
    assert "fastai" not in loaded[1]


def test_the_whole_package_imports_without_a_network(loaded):
    assert {f"vitdynconv.{m}" for m in MODULES} <= loaded[2]


def test_pins_lie_within_the_published_ranges():
    lines = (line.split("#")[0].strip() for line in (ROOT/"constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line]
    pinned = {r.name for r in pins}
    for asked in map(Requirement, (CONFIG["requirements"] + " " + CONFIG["dev_requirements"]).split()):
        assert asked.name in pinned, f"constraints.txt has no version of {asked.name}"
        for pin in (p for p in pins if p.name == asked.name):
            for one in (s for s in pin.specifier if s.operator == "=="):
                assert asked.specifier.contains(one.version), f"{pin} is outside {asked}"
    assert {"nbdev", "execnb", "fastcore", "fastai", "ghapi", "fastgit", "plum-dispatch", "fastprogress"} <= pinned


def test_one_version_everywhere():
    import yaml, vitdynconv
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert CONFIG["version"] == vitdynconv.__version__ == str(cited["version"])
    assert f"## {CONFIG['version']}" in (ROOT/"CHANGELOG.md").read_text()
