"""The four walks of CONTRIBUTING.md, done in copies of the project: the diff is applied, the package exported, `git diff --stat` is what is printed,
and everything that the walk promises is there without another file being touched."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Four things to add")[1].split("\n## ")[0]
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", TEXT, re.M | re.S))
WALKS = pytest.mark.parametrize("walk", SECTIONS)

PROMISED = {
    "An activation": """
import numpy as np, torch
from vitdynconv import convert, count, create_model
from vitdynconv.framework import build, design_space, describe, equivalence_table
from vitdynconv.layers import create_activation, DynamicConvAttention
from vitdynconv.suites.core import further_rows
from vitdynconv.timing import Setting
cells = [c.spec for c in design_space(activation=('tanh',)) if c.reason is None and c.spec.kernel_type == 'pair']
assert len(cells) > 5
assert build(cells[0], 8, (4, 4))(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
model = create_model('vit_tiny_patch16_224', 'tanh', pos='rel', depth=1, img_size=64)
assert model.blocks[0].attn.act.name == 'tanh'
total = count(model).total
assert total.params == sum(p.numel() for p in model.parameters()) and total.macs > total.params
model.set_input_size((96, 64))
assert model(torch.randn(1, 3, 96, 64)).isfinite().all()
assert describe(DynamicConvAttention(8, 2, activation='tanh'), torch.randn(1, 9, 8)).activation == 'tanh'
assert max(row['gradients'] for row in equivalence_table() if row['computation'].startswith('tanh,')) < 1e-12
assert 'tanh' in [row.work for row in further_rows(Setting(seconds=.01), n=49)]
try: create_activation('tanhh')
except ValueError as e: assert "did you mean 'tanh'" in str(e)
""",
    "A kernel selection": """
import torch
from vitdynconv import convert, create_model
from vitdynconv.framework import describe, design_space, build, equivalence_table
from vitdynconv.layers import DepthwiseSelfAttention, DynamicConvAttention, KernelAttention2d
x = torch.randn(1, 30, 16)
for cls in DynamicConvAttention, DepthwiseSelfAttention:
    mixer = cls(16, 2, grid_size=(5, 6), selection='cross')
    found = describe(mixer, x)
    assert (found.selection, found.num_kernels) == ('cross', 10) and found.row()[1] == 'Hard (local)'
    mixer.set_grid_size((6, 7))
    assert mixer(torch.randn(1, 42, 16)).shape == (1, 42, 16)
assert KernelAttention2d(8, 2, 3, grid_size=(4, 4), selection='cross')(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
for name, kw in [('vit_tiny_patch16_224', dict(depth=1)), ('swin_tiny_patch4_window7_224', dict(depths=(1, 1)))]:
    for kernel in 'pair', 'depthwise':
        assert 'selection=cross' in str(create_model(name, kernel=kernel, selection='cross', **kw).conversion)
cells = [c.spec for c in design_space() if c.reason is None and c.spec.selection == 'cross']
near = [c.spec for c in design_space() if c.reason is None and c.spec.selection == 'neighborhood']
assert len(cells) == len(near) and build(cells[0], 8, (4, 4))(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
rows = [row for row in equivalence_table() if row['computation'].startswith('cross,')]
assert len(rows) == 2 and max(max(row['outputs'], row['gradients']) for row in rows) < 1e-12
""",
    "A backbone": """
import timm, torch
from vitdynconv import convert, count, create_model, to_timm
from vitdynconv.models.commands import vdc_cost
names = timm.list_models('vdc_*poolformer*')
assert {'vdc_poolformer_s12', 'vdc_poolformer_s36', 'vdc_dconv_poolformer_s12', 'vdc_linformer_poolformer_s24'} <= set(names)
model = convert(timm.create_model('poolformer_s12'), 'ln_relu', pos='rel')
assert model.conversion.new and not model.conversion.dropped
total = count(model).total
assert total.params == sum(p.numel() for p in model.parameters()) and total.macs > total.params
try: to_timm(model)
except ValueError as e: assert 'average pooling' in str(e)
else: raise AssertionError('accepted')
maps = create_model('poolformer_s12', 'scaling', features_only=True)(torch.randn(1, 3, 64, 96))
assert [m.shape[2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
""",
    "A field of the recipe": """
import json, subprocess, sys
from pathlib import Path
from vitdynconv.train.build import recipe_model
from vitdynconv.train.recipes import RECIPES, Recipe
recipe = RECIPES['digits'].override('attn_drop=0.25')
recipe.save('recipe.json')
assert json.loads(Path('recipe.json').read_text())['attn_drop'] == .25 and Recipe.load('recipe.json') == recipe
assert "dropout of the kernels' weights" in recipe.table()
assert recipe_model(recipe).blocks[0].attn.attn_drop.p == .25
try: recipe.override('attn_drop=2')
except ValueError as e: assert 'from 0 to 0.99' in str(e)
else: raise AssertionError('accepted')
""",
}


def block(walk, kind):
    "The fenced block of one kind in a walk."
    return re.search(rf"```{kind}\n(.*?)```", SECTIONS[walk], re.S)[1]


def as_cell(text, number):
    "A cell from its lines in percent format."
    head, _, source = text.partition("\n")
    kind = "markdown" if "[markdown]" in head else "code"
    source = source.strip("\n")
    cell = {"cell_type": kind, "id": hashlib.sha1(f"{source}{number}".encode()).hexdigest()[:8], "metadata": {}, "source": source.splitlines(True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def apply(diff, folder):
    "Do to the notebooks of a folder what a diff of CONTRIBUTING.md says."
    path = folder / re.search(r"^\+\+\+ b/(.+)$", diff, re.M)[1]
    body = diff.split("\n", 2)[2]
    added = "\n".join(line[1:] for line in body.splitlines() if line.startswith("+"))
    new = [as_cell(text, i) for i, text in enumerate(re.split(r"^(?=# %%)", added, flags=re.M)) if text.startswith("# %%")]
    if not path.exists():
        meta = json.loads(next(path.parent.glob("*.ipynb")).read_text())["metadata"]
        notebook = {"cells": new, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}
    else:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        sources = ["".join(cell["source"]) for cell in notebook["cells"]]
        where = re.search(r'^@@ in front of "(.+)" @@$', body, re.M)
        if where:
            at, = [i for i, source in enumerate(sources) if source.startswith(where[1])]
            notebook["cells"][at:at] = new
        else:
            context = [line[1:] for line in body.splitlines() if line.startswith(" ")]
            at, = [i for i, source in enumerate(sources) if all(line in source.split("\n") for line in context)]
            notebook["cells"][at]["source"] = sources[at].replace(context[0], f"{context[0]}\n{added}").splitlines(True)
    path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(command, folder):
    "Run a shell command in a copy; its output. It fails with what was printed."
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = command.replace(".venv/bin/", "")
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def copy_of_project(folder):
    "The files of the checkout, as a repository of their own."
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if not (ROOT / name).is_file() or (ROOT / name).is_symlink(): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    run("git init -q . && git add -A && git -c user.name=walk -c user.email=walk@localhost commit -qm start", folder)
    return folder


def words(text):
    "A table of `git diff --stat` without its bars and blanks."
    return [re.sub(r"\s+", " ", re.sub(r"[+-]+$", "", line)).strip() for line in text.strip().splitlines()]


def test_the_promises_are_those_of_the_walks():
    assert PROMISED.keys() == SECTIONS.keys()


@WALKS
def test_a_diff_fits_the_notebooks(walk, tmp_path):
    diff = block(walk, "diff")
    path = re.search(r"^\+\+\+ b/(.+)$", diff, re.M)[1]
    (tmp_path / path).parent.mkdir(parents=True)
    for notebook in (ROOT / path).parent.glob("*.ipynb"): shutil.copy(notebook, (tmp_path / path).parent)
    before = (tmp_path / path).read_text() if (tmp_path / path).exists() else ""
    apply(diff, tmp_path)
    assert (tmp_path / path).read_text() != before


@pytest.mark.slow
@WALKS
def test_a_walk_leads_where_it_says(walk, tmp_path):
    folder = copy_of_project(tmp_path / "copy")
    apply(block(walk, "diff"), folder)
    run("nbdev_export", folder)
    run("git add -A", folder)
    assert words(run("git diff --cached --stat", folder)) == words(block(walk, "text"))
    run(f"python - <<'EOF'\n{PROMISED[walk]}\nEOF", folder)
    for command in block(walk, "sh").strip().splitlines(): run(command, folder)
