"The names that changed: every new one that the changelog lists is there, and no old one is."
import importlib
import re
from functools import reduce

import pytest

from conftest import ROOT

TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
OTHER, SAME = TEXT.split("#### Other names")[1].split("#### Same name, other module")
RENAMED = re.findall(r"^\| `([\w.]+)` \| `([a-z_]\w*(?:\.\w+)+)` \|", OTHER, re.M)
MOVED = [(was, now, re.findall(r"`(\w+)`", names)) for was, now, names in re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| (.+) \|$", SAME, re.M)]


def find(name):
    "What a dotted name in the package stands for: the longest part of it that is a module, and attributes."
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try: module = importlib.import_module("vitdynconv." + ".".join(parts[:end]))
        except ModuleNotFoundError: continue
        return reduce(getattr, parts[end:], module)
    raise ImportError(name)


def test_the_tables_are_read():
    assert len(RENAMED) > 100 and sum(len(names) for _, _, names in MOVED) > 350
    with pytest.raises((ImportError, AttributeError)): find("layers.attention.NoSuchName")


@pytest.mark.parametrize("was, now", RENAMED, ids=[was for was, _ in RENAMED])
def test_a_renamed_thing_is_there(was, now):
    assert find(now) is not None


@pytest.mark.parametrize("was, now, names", MOVED, ids=[f"{was}-{now}" for was, now, _ in MOVED])
def test_a_moved_thing_is_there(was, now, names):
    module = find(now)
    assert not [name for name in names if not hasattr(module, name)]


@pytest.mark.parametrize("module", sorted({was for was, now, _ in MOVED if was not in ("bench", "demo", "study")}))
def test_the_flat_layout_is_gone(module):
    if (ROOT / "vitdynconv" / module / "__init__.py").exists(): return   # a part of that name
    with pytest.raises(ModuleNotFoundError): importlib.import_module(f"vitdynconv.{module}")
