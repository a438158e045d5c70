"The figures as a user has them: in a notebook's front end, in a file, without the widgets."
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vitdynconv.equivalence import DynamicConvBlock
from vitdynconv.plots import INK, draw_block, draw_curves, explore, photograph, shown


def test_sliders_reach_the_front_end():
    "A slider that moves must put a picture into the notebook, not only compute one."
    import nbformat
    from nbclient import NotebookClient
    cells = ["from vitdynconv.plots import explore, photograph", "widget = explore(photograph(size=(32, 48)), patch_size=8, dim=16)\nwidget", "widget.children[0].value = 3"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    states = [s["state"] for s in nb.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()]
    assert {s["description"]: (s["value"], s["max"]) for s in states if "max" in s} == {"row": (3, 3), "column": (3, 5), "head": (0, 3)}
    outputs, = [s["outputs"] for s in states if "outputs" in s]
    assert len(outputs) == 1 and "image/png" in outputs[0]["data"]


def test_without_widgets_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="pip install ipywidgets"): explore(photograph(size=(16, 16)))


@pytest.mark.parametrize("heads, grid", [(1, (3, 5)), (4, (7, 4))])
def test_the_block_is_drawn_at_any_size(heads, grid):
    torch.manual_seed(0)
    block, x = DynamicConvBlock(16, heads), torch.randn(1, 16, *grid)
    drawn, last = shown(draw_block(block, x, head=heads - 1)), 16 - 16 // heads
    torch.testing.assert_close(drawn["output 0"], block(x)[0, last].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn["keys"], block.key(x)[0, last:].flatten(1).detach())


def test_pictures_are_transparent_and_files_can_be_white(tmp_path):
    figure = draw_curves({"loss": {"a": [3, None, 1.]}})
    pixels = np.array(Image.open(io.BytesIO(figure._repr_png_())))
    assert (pixels[[0, -1], [0, -1], 3] == 0).all() and pixels[..., 3].max() == 255
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 3], [3, 1]]
    assert figure.axes[0].title.get_color() == INK
    figure.savefig(tmp_path/"curves.png", facecolor="white")
    assert (np.array(Image.open(tmp_path/"curves.png"))[0, 0] == 255).all()
