"""The notebooks' caretaker: run them in place, make the README, check that nothing made from them is stale.

    notebooks.py run [NOTEBOOK ...]           run from a clean kernel, in reading order, and store the outputs
    notebooks.py readme                       make README.md from nbs/index.ipynb (without Quarto)
    notebooks.py check clean|export|readme    fail if cleaning, exporting or `readme` would change a file; changes none
"""
import argparse, difflib, json, os, posixpath, re, shutil, sys, tempfile, time
from pathlib import Path

import yaml
from nbdev.clean import clean_nb, nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export
from nbdev.serve import proc_nbs
from execnb.nbio import nb2str

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(r"^#\|\s*(cuda|notest|eval:\s*false)\b", re.M | re.I)


def reading_order():
    "Every notebook, in the order of the site's sidebar."
    def flat(entries):
        for e in entries: yield from [e] if isinstance(e, str) else flat(e["contents"])
    sidebar = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]
    return [ROOT/"nbs"/name for name in flat(sidebar["contents"]) if name.endswith(".ipynb")]


def write(path, text):
    "Replace a file at once, or not at all."
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def run_one(path):
    "Run a notebook from a clean kernel; flagged cells keep the outputs they have."
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *args, **kwargs):
            if cell.cell_type == "code" and SKIPPED.search(cell.source): return cell
            return await super().async_execute_cell(cell, *args, **kwargs)

    nb = nbformat.read(path, as_version=4)
    Client(nb, timeout=None, kernel_name="python3", coalesce_streams=True, store_widget_state=False,
           resources={"metadata": {"path": str(path.parent)}}).execute()
    nb = json.loads(nbformat.writes(nb))
    clean_nb(nb)
    write(path, nb2str(nb))


def run(names):
    from nbclient.exceptions import CellExecutionError
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.time()
    for path in [Path(n).resolve() for n in names] or reading_order():
        print(f"{path.relative_to(ROOT)} ", end="", flush=True)
        began = time.time()
        try: run_one(path)
        except CellExecutionError as error: sys.exit(f"failed; the notebook is left as it was\n{error}")
        print(f"{time.time()-began:.1f} s")
    print(f"all {time.time()-start:.1f} s")


def readme(root):
    "README.md of the project at `root`: the index as the site shows it, links turned towards the repository."
    from nbconvert import MarkdownExporter
    with tempfile.TemporaryDirectory() as tmp:  # the index alone: nbdev would process every notebook
        os.makedirs(f"{tmp}/nbs")
        for name in "settings.ini", "nbs/index.ipynb": shutil.copy(root/name, f"{tmp}/{name}")
        os.chdir(tmp); get_config.cache_clear()
        page = proc_nbs(n_workers=0)/"index.ipynb"
        text, resources = MarkdownExporter().from_filename(page, {"output_files_dir": "README_files"})
    front, body = re.match(r"\s*---\n(.*?)\n---\n(.*)", text, re.S).groups()
    front = yaml.safe_load(front)
    local = re.compile(r"(\]\(|\bsrc=\")(?![a-z]+:|#|/|README_files/)([^)\"\s]+)")
    body = local.sub(lambda m: m[1] + posixpath.normpath("nbs/" + m[2]), body)
    shutil.rmtree(root/"README_files", ignore_errors=True)
    for name, data in resources["outputs"].items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    note = "<!-- made from nbs/index.ipynb by `make readme`: edit that -->\n\n"
    head = f"# {front['title']}\n\n> {front['description']}\n\n"
    write(root/"README.md", note + head + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n")


CHECKS = dict(  # what to do in a copy of the project, the files it may change, the cure
    clean=(lambda root: nbdev_clean.__wrapped__(), "nbs/**/*.ipynb", ".venv/bin/nbdev_clean"),
    export=(lambda root: nbdev_export.__wrapped__(), "vitdynconv/**/*.py", ".venv/bin/nbdev_export"),
    readme=(readme, "README*/**/*", "make readme"),
)


def check(what):
    "Do it in a copy, and fail when the copy changes."
    action, pattern, cure = CHECKS[what]
    def files(root):
        found = (p for p in root.glob(pattern) if p.is_file())
        return {p.relative_to(root): p.read_bytes() for p in found if ".ipynb_checkpoints" not in p.parts}
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/"copy"
        copy.mkdir()
        for name in "nbs", "vitdynconv": shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        shutil.copy(ROOT/"settings.ini", copy)
        os.environ.pop("IN_TEST", None)  # nbdev_export does nothing where it is set
        os.chdir(copy); get_config.cache_clear()
        action(copy)
        os.chdir(ROOT)
        now, then = files(ROOT), files(copy)
    stale = sorted(p for p in now.keys() | then.keys() if now.get(p) != then.get(p))
    for path in stale:
        old, new = (x.get(path, b"").decode("utf-8", "replace").splitlines() for x in (now, then))
        print(*list(difflib.unified_diff(old, new, f"{path}", f"{path}, as it should be", lineterm="", n=1))[:20], sep="\n")
    if stale: sys.exit(f"stale: {', '.join(map(str, stale))}; the cure is `{cure}`, then commit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("names", nargs="*", metavar="NOTEBOOK")
    commands.add_parser("readme")
    commands.add_parser("check").add_argument("what", choices=CHECKS)
    args = parser.parse_args()
    if args.command == "run": run(args.names)
    elif args.command == "readme": readme(ROOT)
    else: check(args.what)
