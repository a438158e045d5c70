"Imports point one way: the derivation knows nothing of what the reader meets later, no two parts need each other, and importing the library costs nothing."
import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
import yaml

from conftest import ROOT, cells, notebooks

PACKAGE = ROOT / "vitdynconv"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("_"))
PARTS = sorted({path.relative_to(PACKAGE).parts[0] for path in MODULES if len(path.relative_to(PACKAGE).parts) > 1})
LATER = {"framework", "fast", "models", "data", "train", "viz", "demo", "bench", "study"} # than the derivation


def name_of(path):
    "The module's name within the package: layers.conv."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(source, module=""):
    "The modules of the library that some code imports, wherever the import stands: layers.conv."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join(["vitdynconv", *module.split(".")][:-node.level] + ([base] if base else []))
            names = [base] + [f"{base}.{alias.name}" for alias in node.names]
        else: continue
        found.update(name.removeprefix("vitdynconv.") for name in names if name.startswith("vitdynconv."))
    return found


ARROWS = {name_of(path): imports(path.read_text(), name_of(path)) for path in MODULES}


def test_relative_imports_are_understood():
    assert imports("from ..tools.cli import command", "train.run") >= {"tools.cli"}
    assert imports("from .checkpoint import RunStopped\nfrom . import logbook", "train.run") >= {"train.checkpoint", "train.logbook"}
    assert imports("def f():\n    from vitdynconv.models import convert", "bench") >= {"models"}


@pytest.mark.parametrize("module", [name for name in ARROWS if name.startswith("layers.")])
def test_the_derivation_imports_nothing_that_comes_later(module):
    later = sorted(name for name in ARROWS[module] if name.split(".")[0] in LATER)
    assert not later, f"{module} imports {later}"


@pytest.mark.parametrize("path", [path for path in notebooks() if path.parent.name == "layers"], ids=lambda path: path.name)
def test_a_page_of_the_derivation_imports_only_pictures_from_later_parts(path):
    for cell in cells(path, "code"):
        source = "".join(line for line in cell["source"] if not line.startswith(("%", "!")))
        later = {name.split(".")[0] for name in imports(source)} & LATER - {"viz"}
        assert not later, f"{later}\n{source}"


def reading_order(entries):
    "The modules of the derivation, in the order in which the sidebar brings their pages."
    for entry in entries:
        if isinstance(entry, dict): yield from reading_order(entry["contents"])
        elif entry.startswith("layers/"):
            text = "\n".join("".join(cell["source"]) for cell in cells(ROOT / "nbs" / entry, "code"))
            yield re.search(r"default_exp (\S+)", text)[1]


ORDER = list(reading_order(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]))


def test_the_order_is_read():
    assert ORDER[:2] == ["layers.conv", "layers.equivalence"] and set(ORDER) == {name for name in ARROWS if name.startswith("layers.")}


BUILDERS = {"layers.mixer", "layers.takeover"}   # what every layer stands on; their pages are for builders and close the derivation
BY_NAME = {("layers.equivalence", "layers.activations")}   # `attention(activation='relu')`: a name is looked up in the registry when it is called


@pytest.mark.parametrize("module", ORDER)
def test_a_page_of_the_derivation_needs_no_later_page(module):
    later = ARROWS[module] & set(ORDER[ORDER.index(module) + 1:]) - BUILDERS - {name for page, name in BY_NAME if page == module}
    assert not later, f"{module} imports {sorted(later)}, which the reader meets later"


def test_no_two_parts_need_each_other():
    graph = {part: set() for part in PARTS}
    for module, needed in ARROWS.items():
        part = module.split(".")[0]
        if part in graph: graph[part] |= {name.split(".")[0] for name in needed} & set(PARTS) - {part}
    try: list(TopologicalSorter(graph).static_order())
    except CycleError as error: pytest.fail(f"parts in a circle: {' <- '.join(error.args[1])}")


def test_no_module_imports_itself_by_a_detour():
    graph = {module: {name for name in needed if name in ARROWS and name != module} for module, needed in ARROWS.items()}
    try: list(TopologicalSorter(graph).static_order())
    except CycleError as error: pytest.fail(f"modules in a circle: {' <- '.join(error.args[1])}")


def loaded(code):
    "What is in sys.modules after some code, in a fresh interpreter."
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import vitdynconv", "import vitdynconv.layers, vitdynconv.framework, vitdynconv.models, vitdynconv.train",
                                  "import vitdynconv; dir(vitdynconv); vitdynconv.__version__"])
def test_importing_the_library_costs_nothing(code):
    heavy = {"torch", "timm", "fastai", "numpy", "pandas", "matplotlib", "torchvision"} & loaded(code)
    assert not heavy, heavy


def test_the_derivation_needs_torch_and_timm_alone():
    heavy = {"fastai", "pandas", "matplotlib", "sklearn", "fvcore", "accelerate", "nbdev", "IPython"}
    assert not heavy & loaded("import vitdynconv.layers.attention, vitdynconv.layers.depthwise, vitdynconv.layers.dynconv")


def test_every_name_of_a_face_is_there():
    code = """
import importlib, vitdynconv
for part in [None, *%r]:
    face = importlib.import_module('vitdynconv' + ('.' + part if part else ''))
    for name in getattr(face, '__all__', []): getattr(face, name)
    try: face.no_such_name
    except AttributeError as error: assert 'no_such_name' in str(error)
    else: raise SystemExit(f'{face} has everything')
""" % PARTS
    loaded(code)


MIRRORED = {"attention", "depthwise_attention", "dynamic_conv", "split_heads"}   # `framework.reference` writes the definitions in NumPy


def defined(path):
    "The public names that a module makes at top level, methods that fastcore's patch adds left out."
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not any("patch" in ast.unparse(mark) for mark in node.decorator_list): yield node.name
        elif isinstance(node, ast.Assign): yield from (each.id for each in node.targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.AnnAssign): yield node.target.id


def test_one_name_is_one_thing():
    made = {}
    for path in MODULES:
        for name in defined(path):
            if not name.startswith("_"): made.setdefault(name, []).append(name_of(path))
    twice = {name: modules for name, modules in made.items() if len(modules) > 1}
    assert {name for name in MIRRORED if "framework.reference" in made.get(name, [])} == MIRRORED
    assert {name: modules for name, modules in twice.items() if name not in MIRRORED} == {}
    assert all(len(twice[name]) == 2 for name in MIRRORED)
