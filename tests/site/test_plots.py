"The figures as a user has them: in a notebook's front end, in a file, without the widgets."
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdynconv.layers.equivalence import DynamicConvBlock
from vitdynconv.viz.curves import Band, band, draw_convergence, draw_curves, line_styles
from vitdynconv.viz.explorer import explore
from vitdynconv.viz.figures import draw_block, draw_card, draw_icon
from vitdynconv.viz.photo import PhotoMixer, photograph
from vitdynconv.viz.theme import INK, PAGE_WIDTH, shown

IMAGES = Path(__file__).resolve().parents[2]/"nbs/images"


def test_sliders_reach_the_front_end():
    "A slider that moves must put a picture into the notebook, not only compute one."
    import nbformat
    from nbclient import NotebookClient
    cells = ["from vitdynconv.viz.explorer import explore, photograph", "widget = explore(photograph(size=(32, 48)), patch_size=8, dim=16)\nwidget", "widget.children[0].value = 3"]
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
    pixels = np.array(Image.open(io.BytesIO(figure.png())).convert("RGBA"))
    assert (pixels[[0, -1], [0, -1], 3] == 0).all() and pixels[..., 3].max() > 250
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 3], [3, 1]]
    assert figure.axes[0].title.get_color() == INK
    figure.savefig(tmp_path/"curves.png", facecolor="white")
    assert (np.array(Image.open(tmp_path/"curves.png"))[0, 0] == 255).all()


# Curves

def boxes(figure):
    "What the figure's text and axes take, in pixels."
    figure.draw_without_rendering()
    return [a.get_window_extent() for a in figure.axes], figure.legends[0].get_window_extent()


@pytest.mark.parametrize("lines, panels", [(1, 1), (2, 2), (13, 2), (13, 3), (5, 4)])
def test_the_legend_stands_below_the_panels(lines, panels):
    "Thirteen rows of Table 2 in one panel: no curve is covered, no line of the legend is cut off, no letter shrinks on a page."
    curves = {f"a line with the number {i}": [1 + i, 2 - i, i / 2] for i in range(lines)}
    figure = draw_curves({f"panel {p}": curves for p in range(panels)}, "a note")
    axes, legend = boxes(figure)
    assert all(a.y0 > legend.y1 for a in axes) and legend.y0 >= 0 and 0 <= legend.x0 and legend.x1 <= figure.bbox.x1 + 1
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(curves)
    assert figure.legends[0].get_title().get_text() == "a note"
    assert min(a.width for a in axes) > 180 and min(a.height for a in axes) > 120
    assert figure.get_figwidth() <= PAGE_WIDTH and len({round(a.x0) for a in axes}) <= 3


def test_thirty_lines_differ_without_colour_and_keep_their_looks():
    looks = {(style["marker"], str(style["ls"])) for style in line_styles(30)}
    assert len(looks) == 30 and len({style["marker"] for style in line_styles(13)}) == 13
    figure = draw_curves({"loss": {"a": [1, 2], "b": [2, 3]}, "accuracy": {"b": [3, 4], "c": [4, 5]}})
    look = lambda line: (line.get_label(), line.get_marker(), line.get_color())
    assert look(figure.axes[0].lines[1]) == look(figure.axes[1].lines[0])       # b is b in both
    assert len(figure.legends[0].get_texts()) == 3


def test_a_band_is_the_mean_and_the_range_of_the_runs_that_got_so_far():
    assert band([[1, 4, 7], [3, None, 1], [5, 6]]) == Band([3, 5, 4], [1, 4, 1], [5, 6, 7])
    assert band([[None], [None]]) == Band([None], [None], [None])
    figure = draw_curves({"loss": {"seeds": Band([1., None, 3.], [0., None, 2.], [2., None, 5.]), "one": [4., 4.]}}, start=0)
    line, other = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0, 1], [2, 3]] and other.get_xydata().tolist() == [[0, 4], [1, 4]]
    filled, = figure.axes[0].collections
    assert {(0, 0), (0, 2), (2, 2), (2, 5)} <= set(map(tuple, filled.get_paths()[0].vertices.tolist()))


def test_runs_of_one_kind_become_a_band():
    rows = lambda *losses: [dict(epoch=i + 1, train_loss=v) for i, v in enumerate(losses)]
    figure = draw_convergence({"one": rows(3., 2.), "two": (rows(4., 2.), rows(6., 3.))})
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[3, 2], [5, 2.5]] and len(figure.axes[0].collections) == 1
    with pytest.raises(ValueError, match=r"choose from \['epoch', 'train_loss'\]"): draw_convergence({"two": (rows(1.), rows(2.))}, columns=("acc",))


# The project's own pictures

def pixels(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGBA")).astype(float)


def test_the_committed_pictures_are_what_the_code_draws():
    photo = photograph()
    mixer = PhotoMixer(photo, patch_size=16)
    with torch.no_grad(): painted = mixer(photo).clip(0, 1)
    front = draw_block(mixer.block, mixer.embed(photo), kernels=(66, 157, 220), photos=(photo, painted))
    torch.testing.assert_close(shown(front)["painted"], painted[0].permute(1, 2, 0))
    card = draw_card(front, "vitdynconv", "Vision Transformers as\nConvNets with dynamic\nconvolutions")
    drawn = {"block": front.png(), "favicon": draw_icon().png(100, tight=False), "card": card.png(100, "white", tight=False)}
    for name, data in drawn.items():
        now, then = pixels(data), pixels((IMAGES/f"{name}.png").read_bytes())
        assert abs(now.shape[0] - then.shape[0]) <= 2 and abs(now.shape[1] - then.shape[1]) <= 2   # letters differ a little between versions
        h, w = np.minimum(now.shape, then.shape)[:2]
        apart = np.abs(now[:h, :w].astype(float) - then[:h, :w])
        assert apart.mean() < 4 and (apart.max(-1) > 64).mean() < .02, f"{name}.png: make notebooks NB=nbs/viz/03_figures.ipynb"


@pytest.mark.parametrize("ground", [255, 0x22])
def test_the_first_pages_picture_is_legible_on_light_and_dark(ground):
    "Its ground is transparent, and ink and fills stand out from either page."
    rgba = pixels((IMAGES/"block.png").read_bytes())
    alpha = rgba[..., 3:] / 255
    assert (alpha[[0, -1], :] == 0).all()
    seen = (rgba[..., :3] * alpha + ground * (1 - alpha)).mean(-1)
    words = slice(0, 100), slice(600, 850)                                    # the words above the queries
    letters = seen[words][alpha[words][..., 0] > .9]
    assert len(letters) > 50 and abs(letters - ground).min() > 60
