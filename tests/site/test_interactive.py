"The page to click on: its script, run by Node.js, is the network that PyTorch runs."
import base64, json, re, subprocess
from pathlib import Path

import pytest
import torch

from conftest import require

from vitdynconv.viz.explorer import NETWORK, explore_page, network_data
from vitdynconv.viz.photo import SHOWN_ACTIVATIONS, PhotoMixer, photograph, run_activations

PAGE = Path(__file__).resolve().parents[2]/"nbs/viz/05_explorer.ipynb"


@pytest.fixture(scope="module")
def mixer():
    return PhotoMixer(photograph(size=(48, 72)), dim=12, num_heads=3)


def node(script):
    "What a script writes as JSON. Without Node.js it is skipped on a developer's machine and fails in continuous integration."
    require("node")
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("position, head", [(0, 0), (29, 1), (53, 2)])
def test_the_script_answers_as_the_modules_do(mixer, position, head):
    calls = f"net.answers({position}, {head}), ...{json.dumps(SHOWN_ACTIVATIONS)}.map(name => net.weights(name, {position}, {head}))"
    answers, *weights = node(f"{NETWORK}\nconst net = new Network({json.dumps(network_data(mixer))})\nconsole.log(JSON.stringify([{calls}].map(a => [...a])))")
    logits, results = run_activations(mixer)
    torch.testing.assert_close(torch.tensor(answers), logits[head, position], rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    for name, found in zip(SHOWN_ACTIVATIONS, weights):
        expected = results[name].weights[head, position]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("name", SHOWN_ACTIVATIONS)
def test_the_script_paints_as_the_modules_do(mixer, name):
    painted = node(f"{NETWORK}\nconst net = new Network({json.dumps(network_data(mixer))})\nconsole.log(JSON.stringify([...net.paint(net.mix('{name}'))]))")
    torch.testing.assert_close(torch.tensor(painted).reshape(3, 48, 72), run_activations(mixer)[1][name].output.permute(2, 0, 1).clip(0, 1), rtol=0, atol=2e-3)


STAGE = """
// as much of a browser as the page asks for
const element = tag => ({tag, style: {}, children: [], attributes: {}, textContent: '', value: '0', marks: 0,
  appendChild(e) { this.children.push(e); return e }, replaceChildren() { this.children = [] }, setAttribute(k, v) { this.attributes[k] = v },
  getContext() { const self = this; return {putImageData: i => { self.image = [...i.data]; self.marks = 0 }, strokeRect: () => self.marks++} },
  getBoundingClientRect: () => ({left: 10, top: 20, width: 90, height: 60})})
class ImageData { constructor(w, h) { this.data = new Uint8ClampedArray(4 * w * h) } }
const found = element('div'), document = {createElement: element, getElementById: () => found}
const waiting = []; const setTimeout = f => waiting.push(f)
const all = (e, tag) => [...(e.tag == tag ? [e] : []), ...e.children.flatMap(c => all(c, tag))];
"""

def test_clicks_and_keys_move_the_position():
    page = explore_page(photograph(size=(48, 72)), position=(1, 2), dim=12)
    script = re.search(r"<script>(.*)</script>", page, re.S)[1]
    states = node(STAGE + script + """
    const line = () => all(found, 'p')[0].textContent.match(/row \\d+, column \\d+/)[0], states = [line()]
    while (waiting.length) waiting.shift()()
    const photo = all(found, 'canvas')[0], key = key => photo.onkeydown({key, preventDefault() {}})
    photo.onclick({clientX: 10 + 89, clientY: 20 + 1}); states.push(line())
    key('ArrowRight'); states.push(line()); key('ArrowLeft'); key('ArrowDown'); states.push(line())
    const before = all(found, 'canvas').map(c => c.image.join()), select = all(found, 'select')[0]
    select.value = '3'; select.onchange()
    const after = all(found, 'canvas').map(c => c.image.join())
    const kernels = 8, weights = [...Array(6).keys()].map(i => 1 + kernels + 2 * i)
    const drawn = all(found, 'canvas')[weights[1]].image.filter((_, i) => i % 4 == 1)   // green of `none`: the answers themselves
    states.push(weights.map(i => before[i] != after[i]), weights.map(i => before[i + 1] == after[i + 1]), all(found, 'option').length, all(found, 'canvas').length, photo.marks, drawn)
    console.log(JSON.stringify(states))""")
    assert states[:4] == ["row 1, column 2", "row 0, column 8", "row 0, column 8", "row 1, column 7"]
    assert all(states[4]) and all(states[5])           # another head: other weights, the same outputs
    assert states[6:9] == [4, 1 + 8 + 12, 18]          # heads, pictures, marks: nine rectangles in two colours
    drawn = torch.tensor(states[9]).reshape(48, 72)
    assert (drawn == drawn[::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1)).all()
    answers = run_activations(PhotoMixer(photograph(size=(48, 72)), dim=12))[0][3, 16].reshape(6, 9)
    lighter = answers.flatten().argsort()              # the scale grows lighter all the way
    assert (drawn[::8, ::8].flatten()[lighter].diff() >= -1).all() and drawn.unique().numel() > 10


def test_the_page_is_small_fetches_nothing_and_has_a_picture_to_fall_back_on():
    page = explore_page()
    assert len(page) < 120_000
    still, = re.findall(r'<img [^>]*alt="[^"]+" src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(still).startswith(b"\x89PNG")
    code = page.replace(still, "")
    assert not re.search(r"https?:|<link|<iframe|\bsrc=\"(?!data:|\")|fetch\(|import\(", code)
    assert not re.search(r"width:\s*\d+px", code)      # narrow screens


def test_the_notebook_stores_the_page():
    outputs = [o for c in json.loads(PAGE.read_text())["cells"] for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    stored, = ("".join(o["data"]["text/html"]) for o in outputs)
    assert stored.count("<script>") == 1 and "image/png;base64" in stored and NETWORK.strip() in stored


def test_pointing_at_a_map_shows_where_its_kernel_is_used():
    "A row of the matrix for the position that was chosen, a column for the one that is pointed at, and the row again afterwards."
    photo = photograph(size=(48, 72))
    script = re.search(r"<script>(.*)</script>", explore_page(photo, position=(1, 2), dim=12), re.S)[1]
    row, column, again, channel, hint = node(STAGE + script.replace("explore(document", "globalThis.net = net; explore(document") + """
    const map = all(found, 'canvas').slice(9)[2 * 2], picture = () => map.image.filter((_, i) => i % 4 == 1)  // of `scaling`: green
    const hint = () => all(found, 'p').at(-1).textContent
    const states = [picture()]
    map.onpointermove({clientX: 10 + 89, clientY: 20 + 1}); states.push(picture()); const said = hint()
    map.onpointerleave(); states.push(picture())
    console.log(JSON.stringify([...states, [...net.channel('ln', 8, 0)], said]))""")
    assert row == again != column and "row 0, column 8" in hint
    expected = run_activations(PhotoMixer(photo, dim=12))[1]["ln"].weights[0, :, 8]
    torch.testing.assert_close(torch.tensor(channel), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
