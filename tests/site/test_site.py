"The site, without Quarto: its configuration as data, and the pages that nbdev hands to it."
import ast, configparser, importlib, io, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import require

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/"nbs"
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/"settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
CONFIG = yaml.safe_load((ROOT/"_quarto.yml").read_text())
HTML, WEBSITE = CONFIG["format"]["html"], CONFIG["website"]
SECTIONS = ["Derivation", "Tutorials", "Results", "Framework", "Fast", "Models", "Beyond the paper", "Data", "Training",
            "Pictures", "Commands and tools", "Reference"]


def flat(entries):
    "The files of a sidebar, in order."
    for e in entries: yield from [e] if isinstance(e, str) else flat(e["contents"])


PAGES = list(flat(WEBSITE["sidebar"]["contents"]))
BUILDERS = ["layers/05_mixer.ipynb", "layers/06_takeover.ipynb"]   # no reader needs them: they close the derivation


# The configuration

def test_sidebar_lists_every_notebook_once():
    found = [p.relative_to(NBS) for p in NBS.rglob("*.ipynb")]
    assert sorted(PAGES) == sorted(str(p) for p in found if not any(part.startswith((".", "_")) for part in p.parts))
    assert PAGES[0] == "index.ipynb"


def test_sidebar_is_in_reading_order():
    assert [e["section"] for e in WEBSITE["sidebar"]["contents"] if isinstance(e, dict)] == SECTIONS
    for section in WEBSITE["sidebar"]["contents"]:   # a chapter that gathers pages of several parts has each part in order
        pages = [page for page in flat([section]) if page not in BUILDERS]
        for part in {Path(n).parent for n in pages}:
            numbered = [n for n in pages if Path(n).parent == part and Path(n).name[0].isdigit()]
            assert numbered == sorted(numbered)
    tables = [n for n in PAGES if n.startswith("results/table")]
    assert tables == ["results/table1.ipynb", "results/table2.ipynb", "results/table3.ipynb"]


def test_the_derivation_ends_with_the_pages_for_builders():
    derivation, = [e for e in WEBSITE["sidebar"]["contents"] if isinstance(e, dict) and e["section"] == "Derivation"]
    assert derivation["contents"][-1] == {"section": "For builders", "contents": BUILDERS}
    assert sum(page in BUILDERS for page in PAGES) == len(BUILDERS)


def test_a_reader_can_search_move_on_edit_and_ask():
    assert WEBSITE["search"] and WEBSITE["navbar"]["search"] and WEBSITE["page-navigation"] and HTML["toc"]
    assert set(WEBSITE["repo-actions"]) == {"edit", "issue", "source"}
    for page in PAGES: assert (ROOT/WEBSITE["repo-subdir"]/page).is_file()      # what the edit links point at


def test_math_is_pinned():
    "KaTeX's newest version would change formulas under a site that stands."
    math = HTML["html-math-method"]
    assert math["method"] == "katex" and re.fullmatch(r"https://[\w./-]+/katex@\d+\.\d+\.\d+/dist/", math["url"])


def test_the_build_does_not_stumble_over_its_own_markdown():
    "Quarto before 1.10.15 deletes the Markdown twin of a page that has its notebook's name, and then fails for want of it, unless it is told to keep it."
    assert "commonmark" not in CONFIG["format"] or HTML.get("keep-md")
    workflow = yaml.safe_load((ROOT/".github/workflows/docs.yml").read_text())
    version, = (step["with"]["version"] for step in workflow["jobs"]["build"]["steps"] if "quarto" in step.get("uses", ""))
    assert tuple(map(int, version.split("."))) >= (1, 10, 15)
    assert [step["run"] for step in workflow["jobs"]["build"]["steps"] if "run" in step] == ["make docs"] # no step by hand


def test_nothing_is_fetched_in_whatever_version_is_newest():
    text = (ROOT/"_quarto.yml").read_text() + (NBS/"styles.css").read_text()
    for address in re.findall(r"https?://(?:cdn|unpkg|esm)[^\s\"']+", text): assert re.search(r"@\d+\.\d+\.\d+", address), address


def test_light_and_dark():
    assert HTML["respect-user-color-scheme"] is True
    assert set(HTML["theme"]) == {"light", "dark"} and HTML["theme"]["light"] != HTML["theme"]["dark"]


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_closed(page):
    for cell in json.loads((NBS/page).read_text())["cells"]:
        if cell["cell_type"] != "markdown": continue
        text = re.sub(r"```.*?```|`[^`\n]*`|\\\$", "", "".join(cell["source"]), flags=re.S)
        parts = re.split(r"(\${1,2})", text)
        assert parts.count("$") % 2 == 0 and parts.count("$$") % 2 == 0, text
        for formula in re.findall(r"\$\$(.*?)\$\$|\$([^$]*)\$", text, re.S):
            assert "".join(formula).count("{") == "".join(formula).count("}"), formula


def test_narrow_screens():
    css = (NBS/HTML["css"]).read_text()
    rules = {selector.strip(): body for selectors, body in re.findall(r"([^{}]+)\{([^}]*)\}", re.sub(r"/\*.*?\*/", "", css, flags=re.S)) for selector in selectors.split(",")}
    assert "overflow-x: auto" in rules["main table"] and "max-width: 100%" in rules["main table"]
    assert "max-width: 100%" in rules["main img"] and "overflow-x: auto" in rules[".cell-output-display"]
    assert HTML["lightbox"]
    assert not re.search(r"(?<!-)width:\s*\d+px", css)


@pytest.mark.parametrize("page", PAGES)
def test_no_output_is_wider_than_it_need_be(page):
    "HTML in an output has no width in pixels, fetches nothing and stays small."
    for cell in json.loads((NBS/page).read_text())["cells"]:
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert len(html) < 120_000
            assert not re.search(r"(?<![-\w])width:\s*\d{3,}px|<(table|div|img)[^>]* width=\"?\d{3,}", html)
            assert not re.search(r"<script[^>]* src=|<link |<iframe", html)


def picture(path):
    data = (NBS/path).read_bytes()
    assert len(data) < 150_000, f"{path}: {len(data)} bytes"
    return Image.open(io.BytesIO(data))


def test_favicon_and_card():
    assert picture(WEBSITE["favicon"]).size == (64, 64)
    card = WEBSITE["open-graph"]
    assert picture(card["image"]).size == (card["image-width"], card["image-height"]) == (1200, 630)
    assert card["image-alt"] and WEBSITE["twitter-card"] == {"image": card["image"], "card-style": "summary_large_image"}


# Open in Colab

def colab(page):
    "Where a page's link to Colab leads, as settings.ini has it."
    return f"https://colab.research.google.com/github/{SETTINGS['user']}/{SETTINGS['repo']}/blob/{SETTINGS['branch']}/{SETTINGS['nbs_path']}/{page}"


def colab_script():
    script, = [e["text"] for e in HTML["include-after-body"] if "colab" in e["text"]]
    return re.fullmatch(r"\s*<script>(.*)</script>\s*", script, re.S)[1]


def page_address(notebook):
    "The address that nbdev and Quarto give a notebook's page: without the number."
    path = Path(notebook)
    return str(path.with_name(re.sub(r"^\d+[a-zA-Z]?_", "", path.stem) + ".html"))


def test_page_addresses_are_nbdevs_and_unlike(site):
    assert len({page_address(page) for page in PAGES}) == len(PAGES)
    for page in PAGES:
        head = json.loads((site/page).read_text())["cells"][0]["source"]
        found, = re.findall(r"^output-file: (.*)$", "".join(head), re.M)
        assert found == Path(page_address(page)).name


def test_colab_links_are_of_this_repository():
    assert colab("").rstrip("/") + "/' + notebook + '.ipynb'" in colab_script()
    assert SETTINGS["doc_baseurl"] == "/vitdynconv" and r"^\/(vitdynconv\/)?" in colab_script()
    assert colab("index.ipynb") in (NBS/"index.ipynb").read_text()
    listed = re.findall(r"^\s*'([\w/]+)',$", colab_script(), re.M)
    assert [f"{name}.ipynb" for name in listed] == PAGES, ".venv/bin/python .ci/notebooks.py colab"


def test_every_page_has_its_link_to_colab():
    "Run as the browser runs it, at every address that a page has; the link leads to a notebook that there is."
    require("node")
    base = SETTINGS["doc_baseurl"] + "/"
    addresses = {base: "index.ipynb"} | {root + page_address(page): page for page in PAGES for root in (base, "/")}
    script = f"""const found = []
    for (const pathname of {json.dumps([*addresses, base + "404.html"])}) (location => {{
      const document = {{createElement: () => ({{}}), querySelector: () => ({{append: link => found.push(link.href)}})}}
      {colab_script()}
    }})({{pathname}})
    console.log(JSON.stringify(found))"""
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [colab(page) for page in addresses.values()]      # and none on the page of errors
    for page in addresses.values(): assert (NBS/page).is_file()


# What nbdev hands to Quarto

def test_the_configuration_is_found_and_complete(site):
    "As Quarto reads it in _proc: the shim, then the files that it names, and it is silent about those it does not find."
    shim, merged = yaml.safe_load((site/"_quarto.yml").read_text()), {}
    assert shim["project"] == {"type": "website"} and "project" not in CONFIG
    for name in shim["metadata-files"]:
        for key, value in yaml.safe_load((site/name).read_text()).items(): merged.setdefault(key, {}).update(value)
    website = merged["website"]
    assert website["title"] == SETTINGS["title"] and website["description"] == SETTINGS["description"]
    assert website["site-url"] == "https://vitdynconv.github.io/vitdynconv" and website["repo-url"] == "https://github.com/vitdynconv/vitdynconv"
    assert website["repo-branch"] == SETTINGS["branch"] and merged["project"]["output-dir"] == SETTINGS["doc_path"]
    assert website["sidebar"]["contents"] == WEBSITE["sidebar"]["contents"]
    assert (NBS/"_quarto.yml").read_bytes() == (site/"_quarto.yml").read_bytes()


def test_every_page_and_file_arrives(site):
    for page in PAGES: assert (site/page).is_file(), page
    for name in "404.qmd", HTML["css"], WEBSITE["favicon"], WEBSITE["open-graph"]["image"]: assert (site/name).is_file(), name
    for page in PAGES:
        for cell in json.loads((site/page).read_text())["cells"]:
            if cell["cell_type"] != "markdown": continue
            for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", "".join(cell["source"])):
                assert re.match("https?:", name) or ((site/page).parent/name).is_file(), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_a_head(site, page):
    first = json.loads((site/page).read_text())["cells"][0]
    head = yaml.safe_load(re.fullmatch(r"---\n(.*)\n---\s*", "".join(first["source"]), re.S)[1])
    assert head["title"] and head["description"]


def public(module):
    "The functions and classes that a module exports, as it was written."
    body = ast.parse((ROOT/"vitdynconv"/(module.replace(".", "/") + ".py")).read_text()).body
    exported, = [ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    return [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in exported]


@pytest.mark.parametrize("page", [p for p in PAGES if "default_exp" in (NBS/p).read_text()])
def test_every_public_name_is_on_its_page(site, page):
    "nbdev's show_doc puts a heading, the signature and the docstring where a name is defined."
    module = ".".join([*Path(page).parts[:-1], re.sub(r"^\d+_", "", Path(page).stem)])
    outputs = [o for c in json.loads((site/page).read_text())["cells"] for o in c.get("outputs", [])]
    text = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    shown = dict(re.findall(r"^#+ (\w+)\s*\n(.*?)(?=^---$|\Z)", text, re.M | re.S))
    missing = [name for name in public(module) if name not in shown]
    assert not missing, missing
    for name in public(module): assert re.search(rf"(def|class) {name}\(", shown[name]), name


# The first page

INDEX = json.loads((NBS/"index.ipynb").read_text())["cells"]
README = (ROOT/"README.md").read_text()


def test_readme_has_what_a_first_page_needs():
    head, rest = README.split("## ", 1)
    (alt, path), = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", README)
    assert path in head and len(alt) > 50 and (ROOT/path).is_file()
    size = picture(Path(path).relative_to("nbs")).size
    assert size[0] > 1000 and size[0] > size[1]
    assert re.search(r"^make demo .*\nmake test ", README, re.M)
    for section in "Two commands", "Ten lines", "What it brings, and what it costs", "Who it is for", "Where to go on", "Citation": assert f"\n## {section}\n" in README
    for page in PAGES[1:]:
        if not page[0].isdigit(): assert f"nbs/{page}" in README, page


def test_readmes_example_shows_its_output():
    example, output = re.search(r"```python\n(torch\.manual_seed.*?)```\n\n((?:    .*\n)+)", README, re.S).groups()
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    assert re.search(r"\d(e-\d\d) of the outputs, \de-\d\d of the gradients", output)


def test_readmes_table_is_the_counted_and_the_measured():
    import csv
    from vitdynconv.models.cost import Cost
    from vitdynconv.models.formulas import table3_formula
    with open(NBS/"results/speed.csv", newline="") as file: measured = {row["work"]: float(row["ratio"]) for row in csv.DictReader(file) if row["suite"] == "model"}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if re.match(r"\| (DeiT|Swin)-", line)]
    assert len(rows) == 8
    for network, mixer, _, gflops, inference, training in rows:
        base, kernel, activation = network.lower().replace("-", "_"), *(("pair", "softmax") if mixer == "softmax" else ("depthwise", "scaling"))
        ours = sum(table3_formula(base, activation, kernel, "rel").values(), Cost())
        assert gflops == f"{ours.gflops:.2f}"
        stale = "speed.csv has changed: make notebooks NB=nbs/index.ipynb && make readme"
        assert inference == f"{measured[f'{base} {mixer} rel, inference']:.2f}" and training == f"{measured[f'{base} {mixer} rel, training']:.2f}", stale


def test_versions_agree():
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert cff["version"] == SETTINGS["version"] == importlib.import_module("vitdynconv").__version__
    assert cff["url"] == SETTINGS["doc_host"].replace("%(user)s", SETTINGS["user"]) + SETTINGS["doc_baseurl"]
    assert re.search(rf"^## .*{re.escape(SETTINGS['version'])}", (ROOT/"CHANGELOG.md").read_text(), re.M)
    assert "@article{zhou2023interpret" in README and "@article{zhou2023interpret" in (NBS/"reference/citation.ipynb").read_text()
