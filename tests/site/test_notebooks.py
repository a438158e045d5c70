"The notebooks as pages: their links lead somewhere, their outputs are there and fit to be shown, and what they export is documented."
import ast, base64, importlib, inspect, json, re
from pathlib import Path

import pytest
import yaml
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))
MODULES = sorted(".".join(p.relative_to(ROOT/"vitdynconv").with_suffix("").parts) for p in (ROOT/"vitdynconv").rglob("*.py") if not p.stem.startswith("_"))
name_of = lambda path: str(path.relative_to(NBS))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
SKIPPED = re.compile(r"^#\|\s*(cuda|slow|notest|eval:\s*false)\b", re.M | re.I)


def cells(path, kind):
    return [(i, c, "".join(c["source"])) for i, c in enumerate(json.loads(path.read_text())["cells"]) if c["cell_type"] == kind]


def prose(path):
    "All text of a notebook or of a Markdown file, without code."
    text = "\n\n".join(source for _, _, source in cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text()
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def text_of(output):
    "What a reader sees of an output in words."
    parts = [output.get("text", "")] + [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


# The shape of a page

@notebooks
def test_first_text_is_a_title_and_one_line(path):
    "nbdev takes this cell away to make the page's head, and would take any other text in it along."
    first = cells(path, "markdown")[0][2]
    assert re.fullmatch(r"# [^\n]+\n+> [^\n]+", first.strip())


@notebooks
def test_imports_stand_alone(path):
    "Building the site runs every cell that has an import, the whole cell: beside imports, only settings."
    for _, _, source in cells(path, "code"):
        code = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
        body = ast.parse(code).body
        rest = [ast.unparse(node) for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
        settings = ("os.environ", "warnings.", "plt.rc", "mpl.", "matplotlib.", "torch.set_", "torch.manual_seed")
        if len(rest) < len(body): assert all(line.startswith(settings) for line in rest), source


# Links

def slug(heading):
    "A heading's anchor, as Pandoc and so the site makes it."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`$]", lambda m: m[1] or "", heading).lower()
    text = re.sub(r"[^\w\s.-]", "", text).strip()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text)) or "section"


def anchors(path):
    "The anchors of a notebook or of a Markdown file; a heading that occurs again gets a number."
    found, text = [], "\n".join(source for _, _, source in cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"```.*?```", "", text, flags=re.S), re.M):
        given = re.search(r"\{#([\w-]+)\}$", heading)
        name = given[1] if given else slug(heading)
        again = sum(re.fullmatch(re.escape(name) + r"(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{again}" if again and not given else name)
    return found


def test_anchors_are_made_as_pandoc_makes_them():
    assert slug("3. Applications") == "applications" and slug("A `dynamic` conv, [seen](x.ipynb)") == "a-dynamic-conv-seen"
    assert slug("*Dogs*?--in *my* house?") == "dogs--in-my-house" and slug("33") == "section"


def follow(text, path):
    "Every link in a text has a file, and every anchor a heading."
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if re.match(r"[a-z]+:", target): continue
        file = (path.parent/target).resolve() if target else path
        assert file.is_file(), f"{target}: there is no such file"
        if anchor: assert anchor in anchors(file), f"{target} has no heading #{anchor}"


@notebooks
def test_every_link_leads_somewhere(path): follow(prose(path), path)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_link_of_a_text_leads_somewhere(name): follow(prose(ROOT/name), ROOT/name)


@notebooks
def test_links_to_the_repository_lead_somewhere(path):
    "Pages of the site link to files that are not on it by their address."
    for file in re.findall(r"github\.com/vitdynconv/vitdynconv/blob/main/([^)\s#]+)", prose(path)): assert (ROOT/file).is_file(), file


def test_each_page_leads_to_the_next():
    "Read in the order of the sidebar, nobody has to look for the next page."
    flat = lambda entries: [name for e in entries for name in ([e] if isinstance(e, str) else flat(e["contents"]))]
    pages, silent = flat(yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]), []
    for here, there in zip(pages, pages[1:]):
        links = {(NBS/here).parent.joinpath(link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", prose(NBS/here))}
        if (NBS/there).resolve() not in links: silent.append(f"{here} does not link to {there}")
    assert not silent, "\n".join(silent)


# Outputs

def shows(source):
    "Does a cell print, or end in a value that is shown?"
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!", "#|"))]
    body = ast.parse("\n".join(lines)).body
    if not body: return False
    inside = lambda node: not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
    def prints(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "display"): return True
        return inside(node) and any(map(prints, ast.iter_child_nodes(node)))
    value = isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, (ast.Name, ast.Attribute, ast.Subscript)) and not source.rstrip().endswith(";")
    return value or any(map(prints, body))


def test_what_shows_is_recognised():
    assert shows("x = 1\nx") and shows("for i in x: print(i)") and shows("with a: print(1)")
    assert not shows("x = 1") and not shows("def f(): print(1)") and not shows("assert x") and not shows("x;")


@notebooks
def test_cells_that_show_something_hold_an_output(path):
    for i, cell, source in cells(path, "code"):
        if SKIPPED.search(source) or not shows(source): continue
        assert cell["outputs"], f"cell {i} was not run: make notebooks NB=nbs/{name_of(path)}\n{source}"


@notebooks
def test_outputs_are_fit_to_be_shown(path):
    "No warning, no traceback, no path of the machine that made them, no picture that takes long to load."
    trouble = re.compile(r"\w*Warning\b|Traceback \(most recent|(?<![\w.~/:@-])/(?:root|home|Users|tmp|var/folders)/[\w.]|[A-Z]:\\Users")
    for i, cell, source in cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", f"cell {i}\n{source}"
            found = trouble.search(text_of(output))
            assert not found, f"cell {i} shows {found[0]!r}\n{source}"
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/"): continue
                data = "".join(data)
                size = len(data.encode()) if kind == "image/svg+xml" else len(base64.b64decode(data))
                assert size < 100_000, f"cell {i} shows a picture of {size // 1000} KB\n{source}"


def test_the_changelog_page_is_up_to_date():
    page = "\n".join(text_of(o) for _, cell, _ in cells(NBS/"reference/changelog.ipynb", "code") for o in cell["outputs"])
    versions = re.findall(r"^## .*", (ROOT/"CHANGELOG.md").read_text(), re.M)
    assert versions and re.findall(r"^## .*", page, re.M) == versions, "make notebooks NB=nbs/reference/changelog.ipynb"


# Documentation of what is exported

def public(module):
    "Functions and classes that a module exports, by name."
    module = importlib.import_module(f"vitdynconv.{module}")
    return {name: getattr(module, name) for name in module.__all__ if callable(getattr(module, name)) and getattr(getattr(module, name), "__module__", "") == module.__name__}


SAME_EVERYWHERE = set("x q k v bias mask act conv grad weight dtype device model module recipe folder path dls learn dataset seed epoch rank world inputs outputs state".split())

def undocumented(thing):
    "The parameters of which neither type, comment, default nor docstring says what they are, and whose name has no fixed meaning."
    own = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    if own is None or not hasattr(own, "__code__"): return []
    if inspect.isclass(thing) and hasattr(thing, "__dataclass_fields__"): return []
    comments = docments(own, full=True)
    known = lambda p: p.annotation is not p.empty or p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or (comments.get(p.name) or {}).get("docment") or re.search(rf"\b{p.name}\b", thing.__doc__ or "")
    return [p.name for p in inspect.signature(own).parameters.values() if p.name not in {"self", "cls"} | SAME_EVERYWHERE and not known(p)]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    missing = [name for name, thing in public(module).items() if not (thing.__doc__ or "").strip() or (inspect.isclass(thing) and thing.__doc__.startswith(f"{name}("))]
    assert not missing, f"no docstring: {missing}"
    silent = {name: found for name, thing in public(module).items() if (found := undocumented(thing))}
    assert not silent, f"parameters without a type, a shape or a comment: {silent}"
