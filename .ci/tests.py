"""Everything that `make test` checks, with progress and times: first what is made from the notebooks, then the notebooks
and the tests, side by side where there are two cores.

    tests.py            all but what is marked slow
    tests.py --slow     all; this is what continuous integration runs
"""
import argparse, collections, json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CHECKS = {
    "notebooks clean": "clean",
    "package exported from the notebooks": "export",
    "README made from the index": "readme",
    "links to Colab listed": "colab",
}
KINDS = ["failed", "error", "passed", "skipped"]  # of tests, in the order in which they are counted


def cores():
    "How many cores this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_check(number, title, what):
    "One of the checks of what is made from the notebooks; ends the program where it fails."
    began = time.time()
    print(f"{number}/{len(CHECKS) + 2} {title} ", end="", flush=True)
    done = subprocess.run([sys.executable, ROOT/".ci/notebooks.py", "check", what], cwd=ROOT, capture_output=True, text=True)
    print(f"({time.time() - began:.0f} s)", flush=True)
    if done.returncode: sys.exit(done.stdout + done.stderr)


class Step:
    "A command whose lines appear as they come, with a name in front."
    def __init__(self, name, words):
        self.name, self.words, self.lines, self.code = name, [str(word) for word in words], [], None
        self.began = self.ended = time.time()

    def run(self):
        self.began = time.time()
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(self.words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        for line in process.stdout:
            self.lines.append(line.rstrip())
            shown = line.rstrip().replace(f"{ROOT}{os.sep}", "")
            if shown: print(f"{self.name} {time.time() - self.began:4.0f} s | {shown}", flush=True)
        self.code, self.ended = process.wait(), time.time()


def run_lane(steps):
    "One command after the other."
    for step in steps: step.run()


def run_lanes(lanes):
    "Each lane on a core of its own."
    threads = [threading.Thread(target=run_lane, args=[steps]) for steps in lanes]
    for thread in threads: thread.start()
    for thread in threads: thread.join()


def count_tests(folder):
    "What the processes of pytest counted, in words, and whether every test has been run."
    found = [json.loads(path.read_text()) for path in Path(folder).glob("*.counts")]
    total = collections.Counter()
    for counts in found: total.update({kind: number for kind, number in counts["kinds"].items() if kind != "deselected"})
    left_out = max((counts["kinds"].get("deselected", 0) for counts in found), default=0)
    kinds = sorted(total, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))
    words = [f"{total[kind]} {kind}" for kind in kinds] + ([f"{left_out} deselected"] if left_out else [])
    collected, run = max((counts["collected"] for counts in found), default=0), sum(counts["run"] for counts in found)
    if run < collected: words.append(f"{collected - run} not run")
    return ", ".join(words), bool(found) and run == collected


def tell(name, passed, steps):
    "How a part ended."
    seconds = max(step.ended for step in steps) - min(step.began for step in steps)
    died = [f"{step.name} ended with code {step.code}" for step in steps if step.code not in (0, 1)]
    print(f"{name}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s{''.join(f'; {words}' for words in died)}")
    return seconds


def run_all(slow):
    """The notebooks and the tests; the exit code. With two cores one runs tests while the other runs the notebooks, and
    then takes its share of the tests that are left: see share.py."""
    together = cores() > 1
    marks = ["-m", "slow or not slow"] if slow else []
    print(f"{len(CHECKS) + 1}/{len(CHECKS) + 2} notebooks run, {len(CHECKS) + 2}/{len(CHECKS) + 2} tests"
          f"{', side by side' if together else ''}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vitdynconv-tests-") as folder:
        share = [sys.executable, ROOT/".ci/share.py", folder, "-q", "--durations=10", *marks, "tests"]
        notebooks = Step("notebooks", [BIN/"nbdev_test", "--n_workers", 1, "--do_print", "--timing"])
        tests = [Step("tests 1", share), Step("tests 2", share)][:2 if together else 1]
        run_lanes([[notebooks, *tests[1:]], tests[:1]] if together else [[notebooks, *tests]])
        counts, complete = count_tests(folder)
    notebooks_passed = notebooks.code == 0 and "No files were eligible for testing" not in notebooks.lines
    tests_passed = complete and all(step.code == 0 for step in tests)
    tell("notebooks", notebooks_passed, [notebooks])
    seconds = tell("tests", tests_passed, tests)
    if counts: print(f"{counts} in {seconds:.0f} s")
    return 0 if notebooks_passed and tests_passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also the tests that are marked slow")
    args = parser.parse_args()
    for number, (title, what) in enumerate(CHECKS.items(), 1): run_check(number, title, what)
    sys.exit(run_all(args.slow))
