"The book as it is read: its English, its exercises, the start page, and where each page leads."
import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/"nbs"
SIDEBAR = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]


def flat(entries):
    "The files of a sidebar, in order."
    for e in entries: yield from [e] if isinstance(e, str) else flat(e["contents"])


def section(name):
    "The pages of one section."
    entry, = [e for e in SIDEBAR if isinstance(e, dict) and e["section"] == name]
    return list(flat(entry["contents"]))


PAGES, DERIVATION = list(flat(SIDEBAR)), section("Derivation")


def cells(page, kind):
    return ["".join(c["source"]) for c in json.loads((NBS/page).read_text())["cells"] if c["cell_type"] == kind]


def words(page):
    "The prose of a page, without code, formulas and addresses."
    text = "\n\n".join(cells(page, "markdown"))
    return re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)", "·", text, flags=re.S)


# Habits of style that make a reader stumble

THING = (r"(?:block|call|channel|class|column|core|digit|element|entry|epoch|file|folder|GPU|group|head|image|kernel|layer|line|machine|model|network|page|"
         r"parameter|picture|pixel|place|position|process|query|record|row|run|second|seed|side|slot|step|table|task|thread|tile|token|weight|window|word)")
NUMBER = r"(?:two|three|four|five|six|seven|eight|nine|ten|dozens of|\d[\d,.]*)"
TICS = {
    "one table per channel, not 'a table a channel'": rf"\b(?:a|an|one) {THING} (?:a|an) {THING}\b",
    "two numbers per position, not 'two numbers a position'": rf"\b{NUMBER} (?:[\w-]+ )?(?!(?:as|is|has|was|does|makes|takes|needs|gives)\b)[\w-]+s (?:a|an) {THING}\b",
    "one per slot, not 'one a slot'": rf"\b(?:one|two|three|four) (?:a|an) {THING}\b",
    "say what it is, not 'of ours'": r"\b(?:one|some|time|network|networks|helper|model|models|module|run|runs|data) of ours\b",
    "anyone who": r"\bwho(?:m)?ever\b",
    "permanently": r"\bfor good\b",
    "next to": r"\bbeside\b",
    "at no cost": r"\bfor nothing\b(?! else)",
    "say what owns it": r"\bnobody else's business\b|\b(?:is|are) the [\w-]+'s? affair\b|\bdoes not mind\b",
}


def tics(text):
    return [f"{advice}: {found[0]!r}" for advice, pattern in TICS.items() for found in re.finditer(pattern, text, re.I)]


@pytest.mark.parametrize("text", [
    "one table a channel", "a folder a class", "two numbers a position", "weights, one a slot", "8 kernels an image", "two parallel attentions a block", "a helper network of ours",
    "Whoever computes it", "It is gone for good.", "the table beside it", "not for nothing", "the tables are the mixer's affair"])
def test_a_habit_is_found(text): assert tics(text)


@pytest.mark.parametrize("text", ["two convolutions in a row", "a mixer for a place", "16 channels share a kernel", "one core trains a run", "good for nothing else", "a third of an image"])
def test_plain_english_is_left_alone(text): assert not tics(text)


@pytest.mark.parametrize("page", PAGES)
def test_english_is_plain(page): assert not tics(words(page))


@pytest.mark.parametrize("page", PAGES)
def test_no_page_ends_with_a_question(page):
    assert not cells(page, "markdown")[-1].rstrip().endswith("?")


# Exercises

@pytest.mark.parametrize("page", DERIVATION)
def test_each_page_of_the_derivation_ends_with_exercises(page):
    "Three exercises whose solutions are folded, what one can do now, and a link to what is next."
    text = "\n\n".join(cells(page, "markdown"))
    part = text[text.index("## Exercises"):]
    assert len(re.findall(r"^\*\*\d\.\*\* ", part, re.M)) == 3
    solutions = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", part, re.S)
    assert len(solutions) == 3
    assert all(len(solution.strip()) > 40 for solution in solutions)
    assert "**You can now**" in part
    end = part[part.index("**You can now**"):]
    assert re.search(r"\]\([^)]+\.ipynb\)", end)


@pytest.mark.parametrize("page", [p for p in PAGES if p.startswith(("layers/", "framework/00")) or p == "start.ipynb"])
def test_solutions_are_python(page):
    for solution in re.findall(r"<details>.*?</details>", "\n".join(cells(page, "markdown")), re.S):
        for code in re.findall(r"```python\n(.*?)```", solution, re.S): ast.parse(code)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p.startswith(("layers/", "framework/00")) or p == "start.ipynb"])
def test_solutions_are_true(page, monkeypatch):
    "The code of each solution runs where it stands, after the page's own cells."
    import matplotlib
    matplotlib.use("agg")
    monkeypatch.chdir((NBS/page).parent)
    space = {"__name__": "__main__", "display": print}
    for kind, source in [(c["cell_type"], "".join(c["source"])) for c in json.loads((NBS/page).read_text())["cells"]]:
        if kind == "code":
            lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
            if not re.search(r"^#\|\s*(cuda|slow|notest|eval:\s*false)", source, re.M): exec("\n".join(lines), space)
        else:
            for solution in re.findall(r"<details>.*?</details>", source, re.S):
                for code in re.findall(r"```python\n(.*?)```", solution, re.S): exec(code, space)


# The path through the derivation

@pytest.mark.parametrize("page", DERIVATION)
def test_a_page_ends_for_the_reader_before_it_goes_on_for_builders(page):
    "What only builders need stands behind the exercises, and no page tells its reader what to skip."
    text = "\n\n".join(cells(page, "markdown"))
    assert not re.search(r"\bskip\b", words(page))
    if "## For builders" in text: assert text.index("**You can now**") < text.index("## For builders")


def test_the_four_questions_come_right_after_the_identity():
    assert DERIVATION[:3] == ["layers/00_conv.ipynb", "layers/01_equivalence.ipynb", "framework/00_spec.ipynb"]


# Pictures

@pytest.mark.parametrize("page", PAGES)
def test_pictures_have_one_style_and_three_panels_at_most(page):
    "Shown cells draw on the theme's sheets, which are transparent; only the start page's ten thumbnails stand in fives."
    for source in cells(page, "code"):
        if source.startswith("#| export"): continue
        assert "plt.subplots(" not in source, source[:200]
        assert max(map(int, re.findall(r"columns=(\d+)", source)), default=1) <= (5 if page == "start.ipynb" else 3), source[:200]


# The start page

def test_the_start_page_is_short_and_needs_nothing_but_torch_and_the_data():
    code = cells("start.ipynb", "code")
    program = code[:next(i for i, source in enumerate(code) if "net = ConvNet(softmax)" in source)]
    visible = [source for source in program if "echo: false" not in source and "#| hide" not in source]
    lines = [line for source in visible for line in source.splitlines() if line.strip() and not line.strip().startswith(("#", '"'))]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert all(re.match(r"(import|from) (torch|vitdynconv\.data)", line) for line in imports), imports
    assert len(lines) <= 70, f"{len(lines)} lines"
    assert "\n".join(lines).count("F.conv2d(") == 2


def test_start_comes_right_after_the_landing_page():
    assert PAGES[:2] == ["index.ipynb", "start.ipynb"]
    first = (NBS/"index.ipynb").read_text()
    assert first.index("start.ipynb") < first.index("layers/00_conv.ipynb")


def test_the_landing_page_has_the_photograph_at_once():
    "Before any heading: the sentence, the figure, the photograph to click on."
    page = json.loads((NBS/"index.ipynb").read_text())["cells"]
    heading = next(i for i, c in enumerate(page) if "".join(c["source"]).lstrip().startswith("## "))
    outputs = "".join(str(o.get("data", {}).get("text/html", "")) for c in page[:heading] for o in c.get("outputs", []))
    assert "images/block.png" in "".join("".join(c["source"]) for c in page[:heading]) and "<canvas" not in outputs and "explore(" in outputs
