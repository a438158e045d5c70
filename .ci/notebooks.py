"""The notebooks' caretaker: run them in place, make the README, check that nothing made from them is stale.

    notebooks.py run [NOTEBOOK ...]           run each from a clean kernel, one per core at a time, and store the outputs
    notebooks.py readme                       make README.md from nbs/index.ipynb (without Quarto)
    notebooks.py colab                        list the notebooks in _quarto.yml, for the pages' links to Colab
    notebooks.py check clean|export|readme|colab    fail if this would change a file; changes none
"""
import argparse, difflib, json, os, posixpath, re, shutil, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import yaml
from nbdev.clean import clean_nb, nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export
from nbdev.serve import proc_nbs
from execnb.nbio import nb2str
from fastcore.utils import working_directory

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(r"^#\|\s*(cuda|notest|eval:\s*false)\b", re.M | re.I)


def flat(entries):
    "The files of a sidebar, in order."
    for entry in entries:
        if isinstance(entry, str): yield entry
        else: yield from flat(entry["contents"])


def reading_order():
    "Every notebook, in the order of the site's sidebar."
    sidebar = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]
    return [ROOT/"nbs"/name for name in flat(sidebar["contents"]) if name.endswith(".ipynb")]


def write(path, text):
    "Replace a file at once, or not at all."
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def hide_places(nb):
    "Temporary folders have another name in each run and on each machine: in outputs they are called FOLDER."
    place = re.escape(tempfile.gettempdir().rstrip(os.sep)) + r"/tmp\w+"
    def renamed(value):
        if isinstance(value, str): return re.sub(place, "FOLDER", value)
        if isinstance(value, list): return [renamed(part) for part in value]
        return value
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            if "text" in output: output["text"] = renamed(output["text"])
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"): output["data"][kind] = renamed(value)


def number_tables(nb):
    "pandas draws a name for each styled table: they are numbered, so that running a page again changes nothing."
    numbers = {}
    def numbered(found): return f"T_{numbers.setdefault(found[0], len(numbers)):05}"
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            page = output.get("data", {}).get("text/html")
            if page: output["data"]["text/html"] = [re.sub(r"\bT_[0-9a-f]{5}(?=[_\"\s])", numbered, part) for part in page]


def run_one(path):
    "Run a notebook from a clean kernel; flagged cells keep the outputs they have."
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *args, **kwargs):
            if cell.cell_type == "code" and SKIPPED.search(cell.source): return cell
            return await super().async_execute_cell(cell, *args, **kwargs)

    nb = nbformat.read(path, as_version=4)
    Client(nb, timeout=None, kernel_name="python3", coalesce_streams=True,
           extra_arguments=["--IPKernelApp.log_level=ERROR"], resources={"metadata": {"path": str(path.parent)}}).execute()
    nb = json.loads(nbformat.writes(nb))
    nb["metadata"].pop("widgets", None)  # sliders without a kernel; the client needs their state only while it runs
    hide_places(nb)
    number_tables(nb)
    clean_nb(nb)
    write(path, nb2str(nb))


def cores():
    "How many cores this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def try_one(path):
    "Run a notebook; its path, the seconds that it took, and the error's text or None."
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    began = time.time()
    try: run_one(path)
    except (CellExecutionError, DeadKernelError) as error:
        return path, time.time() - began, re.sub(r"\x1b\[[\d;]*m", "", str(error))  # without colours
    return path, time.time() - began, None


def run(names, workers):
    "Run notebooks, `workers` of them side by side, each in a kernel of its own; the first error ends it."
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.jit._script")  # importing fastai 2.8 brings it up
    os.environ.pop("MPLBACKEND", None)  # figures are shown inline
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.time()
    paths = [Path(n).resolve() for n in names] or reading_order()
    with ProcessPoolExecutor(min(workers, len(paths))) as pool:
        for done in as_completed([pool.submit(try_one, path) for path in paths]):
            path, seconds, error = done.result()
            print(f"{path.relative_to(ROOT)} {seconds:.1f} s", flush=True)
            if error is None: continue
            pool.shutdown(wait=True, cancel_futures=True)  # those that are running are finished and stored
            sys.exit(f"{path.relative_to(ROOT)} failed; the notebook is left as it was\n{error}")
    print(f"all {time.time()-start:.1f} s")


def inside(root, action, *args, **kwargs):
    "Do something with `root` as nbdev's project."
    with working_directory(root):
        get_config.cache_clear()
        return action(*args, **kwargs)


def readme(root):
    "README.md of the project at `root`: the index as the site shows it, links turned towards the repository."
    import nbformat
    from nbconvert import MarkdownExporter
    with tempfile.TemporaryDirectory() as tmp:  # the index alone: nbdev would process every notebook
        os.makedirs(f"{tmp}/nbs")
        for name in "settings.ini", "nbs/index.ipynb": shutil.copy(root/name, f"{tmp}/{name}")
        nb = nbformat.read(inside(tmp, proc_nbs, n_workers=0)/"index.ipynb", as_version=4)
    local = re.compile(r"(\]\(|\bsrc=\")(?![a-z]+:|#|/)([^)\"\s]+)")
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if "<script" not in str(o.get("data", {}).get("text/html", ""))]
        if cell.cell_type == "markdown": cell.source = local.sub(lambda m: m[1] + posixpath.normpath("nbs/" + m[2]), cell.source)
    nb.metadata.language_info = {"name": "python"}  # how code is coloured
    text, resources = MarkdownExporter().from_notebook_node(nb, {"output_files_dir": "README_files"})
    front, body = re.match(r"\s*---\n(.*?)\n---\n(.*)", text, re.S).groups()
    body = re.sub(r"```python\n#\| echo: false\n.*?\n```\n", "", body, flags=re.S)  # what the site hides
    front, body = yaml.safe_load(front), body.replace("<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->", "")
    shutil.rmtree(root/"README_files", ignore_errors=True)
    for name, data in resources["outputs"].items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    note = "<!-- made from nbs/index.ipynb by `make readme`: edit that -->\n\n"
    head = f"# {front['title']}\n\n> {front['description']}\n\n"
    write(root/"README.md", note + head + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n")


def colab(root):
    "Write the list of notebooks into the script of _quarto.yml that links each page to its notebook on Colab."
    path = root/"_quarto.yml"
    text = path.read_text(encoding="utf-8")
    sidebar = yaml.safe_load(text)["website"]["sidebar"]["contents"]
    indent = " " * 12
    names = [f"{indent}'{name.removesuffix('.ipynb')}',\n" for name in flat(sidebar) if name.endswith(".ipynb")]
    begin, end = f"{indent}// notebooks: begin\n", f"{indent}// notebooks: end\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if not after: sys.exit("_quarto.yml: the lines '// notebooks: begin' and '// notebooks: end' are gone")
    write(path, before + begin + "".join(names) + end + after)


CHECKS = dict(  # what to do in a copy of the project, the files that it makes, the cure
    clean=(lambda root: inside(root, nbdev_clean.__wrapped__), ["nbs/**/*.ipynb"], ".venv/bin/nbdev_clean"),
    export=(lambda root: inside(root, nbdev_export.__wrapped__), ["vitdynconv/**/*.py"], ".venv/bin/nbdev_export"),
    readme=(readme, ["README.md", "README_files/*"], "make readme"),
    colab=(colab, ["_quarto.yml"], ".venv/bin/python .ci/notebooks.py colab"),
)


def check(what):
    "Do it in a copy, and fail when the copy comes to differ from the project."
    action, patterns, cure = CHECKS[what]
    def files(root):
        found = (p for pattern in patterns for p in root.glob(pattern) if ".ipynb_checkpoints" not in p.parts)
        return {p.relative_to(root): p.read_bytes() for p in found}
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        for name in "nbs", "vitdynconv": shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for name in "settings.ini", "_quarto.yml": shutil.copy(ROOT/name, copy)
        os.environ.pop("IN_TEST", None)  # nbdev_export does nothing where it is set
        action(copy)
        now, then = files(ROOT), files(copy)
    stale = sorted(p for p in now.keys() | then.keys() if now.get(p) != then.get(p))
    for path in stale:
        old, new = (side.get(path, b"").decode("utf-8", "replace").splitlines() for side in (now, then))
        print(*list(difflib.unified_diff(old, new, f"{path}", f"{path}, as it should be", lineterm="", n=1))[:20], sep="\n")
    if stale: sys.exit(f"stale: {', '.join(map(str, stale))}; the cure is `{cure}`, then commit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("names", nargs="*", metavar="NOTEBOOK")
    runs.add_argument("--workers", type=int, default=min(cores(), 4), help="notebooks side by side (default: one per core, at most 4)")
    commands.add_parser("readme")
    commands.add_parser("colab")
    commands.add_parser("check").add_argument("what", choices=CHECKS)
    args = parser.parse_args()
    if args.command == "run": run(args.names, args.workers)
    elif args.command == "readme": readme(ROOT)
    elif args.command == "colab": colab(ROOT)
    else: check(args.what)
