"""The pages in a real browser, on a desk (1400 pixels) and on a phone (390): made by nbdev and nbconvert, with the site's style sheet
in a column as wide as Quarto's, looked at by headless Chromium. And what can be seen in the sources: alt text, names in links, signatures."""
import functools
import html
import http.server
import json
import re
import subprocess
import threading
from pathlib import Path

import pytest

from conftest import NBS, cells, notebooks, require

NAMES = [str(path.relative_to(NBS)) for path in notebooks()]
WIDTHS = {"desk": 1400, "phone": 390}
CODE_WIDTH = 90  # characters of a line of code that a page shows
pages = pytest.mark.parametrize("name", NAMES)


# What the sources tell

def directives(cell):
    "The `#| key: value` lines of a code cell."
    return dict(re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", "".join(cell["source"]), re.M))


def is_shown(cell):
    "Is this cell's code on the page as it was written? Exported code appears as documentation."
    found = directives(cell)
    return not {"export", "exporti", "exports", "default_exp", "hide"} & set(found) and found.get("echo") != "false" and found.get("include") != "false"


def wide_lines(path):
    "Visible lines of code that are longer than a page is wide."
    wide = []
    for cell in cells(path, "code"):
        if not is_shown(cell): continue
        wide += [line.rstrip() for line in cell["source"] if len(line.rstrip()) > CODE_WIDTH and not line.startswith("#|")]
    return wide


# Pages that were written before there was a limit: how many lines they may still have. A number here only goes down.
STILL_WIDE = json.loads((Path(__file__).parent/"wide_lines.json").read_text())


@pages
def test_code_fits_the_page(name):
    "Longer lines are cut off, or scroll, where they are read."
    wide, allowed = wide_lines(NBS / name), STILL_WIDE.get(name, 0)
    assert len(wide) <= allowed, f"{len(wide)} lines of more than {CODE_WIDTH} characters, such as\n" + "\n".join(wide[:3])


@pages
def test_every_picture_has_alt_text(name):
    silent = []
    for number, cell in enumerate(cells(NBS / name)):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            plain = re.sub(r"```.*?```|`[^`\n]*`", "", source, flags=re.S)
            for alt, rest in re.findall(r"!\[([^\]]*)\]\([^)]*\)(\{[^}]*\})?", plain):
                if len(alt) < 15 and "fig-alt" not in rest: silent.append(f"cell {number}: {alt!r}")
            silent += [f"cell {number}: {tag}" for tag in re.findall(r"<img(?![^>]*\balt=\"[^\"]{15,})[^>]*>", plain)]
            continue
        if not any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})): continue
        if len(directives(cell).get("fig-alt", "")) < 15: silent.append(f"cell {number}: no #| fig-alt:")
    assert not silent, silent


@pages
def test_links_are_named_and_not_numbered(name):
    bare = []
    for cell in cells(NBS / name, "markdown"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", "".join(cell["source"]), flags=re.S)
        bare += re.findall(r"\[(?:see |notebook )?(?:\d+[a-z]?(?:_\w+)?|\d+[a-z]?, \d+\w*)\]\([^)]*\)", text)
        bare += re.findall(r"\[(?:the |The )?(?:next|last|previous) (?:notebook|page)\]\([^)]*\)", text)
    assert not bare, bare


def signatures(path):
    "The documentation that nbdev puts on a page, one string per name."
    for cell in cells(path, "code"):
        for output in cell.get("outputs", []):
            text = "".join(output.get("data", {}).get("text/markdown", ""))
            if re.search(r"^```python\n\s*(def|class) |^> +\w+ \(", text, re.M): yield text


@pytest.mark.slow
@pages
def test_signatures_are_plain(site, name):
    "No Markdown within code, and no `*args, **kwargs` in the place of parameters (`renderer` in settings.ini sees to both)."
    trouble = []
    for text in signatures(site / name):
        for code in re.findall(r"```python\n(.*?)```", text, re.S) + re.findall(r"^> +(\w+ \(.*)$", text, re.M):
            if re.search(r"\]\(http|`", code): trouble.append(f"Markdown: {code.strip()[:200]}")
            if re.search(r"\*args, *\*\*kwargs", code): trouble.append(f"no parameters: {code.strip()[:80]}")
    assert not trouble, "\n".join(trouble[:5])


# What the browser tells

STYLE = """
body { margin: 0; font: 17px/1.5 system-ui, sans-serif; }
main { box-sizing: border-box; max-width: 850px; margin: auto; padding: 0 12px; }
pre { font-size: 14px; padding: 8px; margin: 0; background: #f6f6f6; overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; } td, th { padding: 3px 8px; }
"""


def page_html(path):
    "A page made of a processed notebook."
    import nbformat
    from nbconvert import HTMLExporter
    nb = nbformat.read(path, as_version=4)
    title = ""
    if nb.cells and nb.cells[0].cell_type == "raw":
        title = re.search(r"^title: *(.*)$", nb.cells.pop(0).source, re.M)[1].strip("'\"")
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        found = directives(cell)
        alt = html.escape(found.get("fig-alt", ""), quote=True)
        for output in cell.outputs:
            if alt and "image/png" in output.get("data", {}): output.metadata.setdefault("image/png", {})["alt"] = alt
        if not is_shown(cell): cell.source = ""
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    body, _ = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(nb)
    body = re.sub(r"(href=\"[^\":#]+)\.ipynb", r"\1.html", body)
    up = "../" * len(path.relative_to(path.parents[len(path.parts) - 2]).parts[:-1])
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
            f"<style>{STYLE}</style><link rel=stylesheet href='/styles.css'></head><body><main class=content><h1>{title}</h1>{body}</main></body></html>")


@pytest.fixture(scope="session")
def web(site):
    "The address of the site's pages on this machine, and their folder."
    for name in NAMES: (site / name).with_suffix(".html").write_text(page_html(site / name), encoding="utf-8")
    (site / "look.html").write_text(LOOK.replace("NAMES", json.dumps([str(Path(name).with_suffix(".html")) for name in NAMES])))
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", site
    server.shutdown()


LOOK = """<!doctype html><meta charset=utf-8><body style="margin:0"><script>
const names = NAMES, width = Number(location.hash.slice(1)), found = {}
const scrolls = e => { for (let p = e.parentElement; p && p.tagName != 'BODY'; p = p.parentElement)
  if (getComputedStyle(p).overflowX != 'visible') return true; return false }
const look = name => new Promise(done => {
  const frame = document.createElement('iframe')
  frame.style.cssText = `width:${width}px;height:900px;border:0`
  frame.onload = () => setTimeout(() => {
    const page = frame.contentDocument, root = page.documentElement
    const words = e => (e.id || e.textContent || e.outerHTML).trim().replace(/\\s+/g, ' ').slice(0, 80)
    const over = [...page.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(e))
    found[name] = {
      sideways: root.scrollWidth > root.clientWidth + 1 ? over.slice(0, 3).map(e => e.tagName + ': ' + words(e)) : [],
      cut: [...page.querySelectorAll('.highlight pre')].filter(e => e.scrollWidth > e.clientWidth + 1).map(words),
      broken: [...page.images].filter(i => i.complete && !i.naturalWidth).map(i => i.getAttribute('src').slice(0, 80)),
      silent: [...page.images].filter(i => !i.alt).map(i => i.getAttribute('src').slice(0, 40)),
      links: [...page.querySelectorAll('main a[href]')].map(a => a.getAttribute('href')),
      ids: [...page.querySelectorAll('[id]')].map(e => e.id),
    }
    frame.remove()
    done()
  }, 50)
  frame.src = name
  document.body.append(frame)
})
;(async () => { for (const name of names) await look(name)
  const out = document.createElement('pre'); out.id = 'found'; out.textContent = JSON.stringify(found); document.body.append(out) })()
</script>"""


@functools.cache
def looked_at(address, width):
    "What Chromium sees of all pages at a width."
    browser = require("chromium")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={max(width, 500) + 50},1000",
             "--virtual-time-budget=600000", "--dump-dom", f"{address}/look.html#{width}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def seen(web, width, name):
    require("chromium")
    return looked_at(web[0], WIDTHS[width])[str(Path(name).with_suffix(".html"))]


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pages
def test_the_page_does_not_scroll_sideways(web, width, name):
    assert not seen(web, width, name)["sideways"]


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pages
def test_no_code_block_is_cut(web, width, name):
    assert not seen(web, width, name)["cut"]


@pytest.mark.slow
@pages
def test_pictures_are_there(web, name):
    assert not seen(web, "desk", name)["broken"]


@pytest.mark.slow
@pages
def test_every_link_is_alive(web, name):
    "Every link within the site has a page, and every anchor a place on it."
    dead, everything = [], looked_at(web[0], WIDTHS["desk"])
    for link in seen(web, "desk", name)["links"]:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target): continue
        path = str((Path(name).parent / target).with_suffix(".html")) if target else str(Path(name).with_suffix(".html"))
        path = re.sub(r"[^/]+/\.\./", "", path)
        if path not in everything and not (web[1] / path).is_file() and not (web[1] / Path(name).parent / target).is_file(): dead.append(link)
    assert not dead, dead
