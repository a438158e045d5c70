"Private names of other libraries: each one listed is still there, and no module takes one that is not listed."
import ast
import re
from pathlib import Path

import pytest
import torch

from vitdynconv.tools import compat
from vitdynconv.tools.compat import HOOKS, PRIVATE_NAMES

PACKAGE = Path(compat.__file__).resolve().parents[1]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "_modidx" and path != Path(compat.__file__))
OTHERS = ("torch", "timm", "fastai", "fastcore", "fvcore", "argparse", "accelerate", "torchvision", "sklearn", "safetensors", "onnx", "PIL", "matplotlib")
NAMEDTUPLE = {"_asdict", "_replace", "_fields", "_make", "_field_defaults"}  # public in spite of their underscore
UNDOCUMENTED = {"kineto_results"}                                                # private in spite of having none
SHOWN = {"_repr_markdown_", "_repr_html_", "_repr_png_", "_repr_svg_"}       # IPython's, documented


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: name.where)
def test_the_name_is_still_there(name):
    assert name.find() is not None


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: name.where)
def test_the_entry_says_all_there_is_to_say(name):
    assert name.where.startswith(OTHERS) and re.search(r"[.:]_\w+", name.where)
    assert re.fullmatch(r"\d+\.\d+[\w.]*", name.seen) and len(name.why) > 10 and len(name.public) >= 4


def test_a_name_that_is_gone_is_noticed():
    for where in "timm.layers:Attention._no_such", "timm.no_such_module:x", "fastai.learner:NoSuch._do_fit":
        with pytest.raises((ImportError, AttributeError)): compat.PrivateName(where, "1", "", "").find()


def test_every_hook_and_every_call_is_listed():
    listed = {name.where.rpartition(".")[2] for name in PRIVATE_NAMES}
    assert set(HOOKS.values()) <= listed
    tree = ast.parse(Path(compat.__file__).read_text())
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)}
    assert called <= listed, called - listed


def own_names(tree):
    "Private names that a module itself defines: on `self`, as methods, as functions, as fields."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store): names.add(node.attr)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): names.add(node.id)
    return names


def private_names(path):
    "Names with an underscore that a module takes from elsewhere, and methods by which another library would call it."
    tree = ast.parse(path.read_text())
    own = own_names(tree) - set(HOOKS.values())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            private = [part for name in names for part in name.split(".") if re.match("_[a-z]", part)]
            if not getattr(node, "level", 0): found.update((part, node.lineno) for part in private)
        elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and node.attr not in own | NAMEDTUPLE | SHOWN:
            found.add((node.attr, node.lineno))
        elif isinstance(node, ast.Attribute) and node.attr in UNDOCUMENTED: found.add((node.attr, node.lineno))
        elif isinstance(node, ast.FunctionDef) and node.name in HOOKS.values(): found.add((node.name, node.lineno))
        elif isinstance(node, ast.Constant) and node.value in HOOKS.values(): found.add((node.value, node.lineno))
    return sorted(found)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stand_in_compat_only(path):
    found = private_names(path)
    assert not found, f"move to tools/compat: {', '.join(f'{name} (line {line})' for name, line in found)}"


def test_the_scan_sees_what_it_should(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("from timm.models._factory import load\nimport torch._dynamo\nx = block._attn(1)\ny = torch.ops.mkldnn._linear(x)\n"
                      "class A(B):\n    def _do_fit(self): self._own = 1; return self._own\n    def _mine(self): return self._mine\n"
                      "z = getattr(block, '_attn'); row._asdict()\nprofiler.kineto_results.events()\n")
    assert {name for name, _ in private_names(source)} == {"_factory", "_dynamo", "_attn", "_linear", "_do_fit", "kineto_results"}


def test_the_profiler_still_tells_when_memory_changes():
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        kept = torch.ones(16)
        kept = torch.cat([kept, kept])
    assert compat.memory_changes(profiler) == [64, 128, -64]
