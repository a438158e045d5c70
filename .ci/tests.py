"""Everything that `make test` checks, with progress and times: first what is made from the notebooks, then the notebooks
and the tests, side by side where there are two cores.

    tests.py            all but what is marked slow
    tests.py --slow     all; this is what continuous integration runs
"""
import argparse, os, re, subprocess, sys, threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CHECKS = {
    "notebooks clean": "clean",
    "package exported from the notebooks": "export",
    "README made from the index": "readme",
    "links to Colab listed": "colab",
}


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


class Half(threading.Thread):
    "A command whose lines appear as they come, with a name in front."
    def __init__(self, name, words):
        super().__init__()
        self.name, self.words, self.lines, self.code = name, [str(word) for word in words], [], None

    def run(self):
        began = time.time()
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(self.words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            self.lines.append(line.rstrip())
            shown = line.rstrip().replace(f"{ROOT}{os.sep}", "")
            if shown: print(f"{self.name} {time.time() - began:4.0f} s | {shown}", flush=True)
        self.code, self.seconds = process.wait(), time.time() - began

    def last_line(self):
        "The last line that is not empty, without a frame: pytest's count."
        found = [line.strip("= ") for line in self.lines if line.strip()]
        return found[-1] if found else ""


def run_halves(slow):
    "The notebooks and the tests; the exit code."
    marks = ["-m", "slow or not slow"] if slow else []
    notebooks = Half("notebooks", [BIN/"nbdev_test", "--n_workers", 1, "--do_print", "--timing"])
    tests = Half("tests", [sys.executable, "-m", "pytest", "-q", "--durations=10", *marks, "tests"])
    together = cores() > 1
    print(f"{len(CHECKS) + 1}/{len(CHECKS) + 2} notebooks run, {len(CHECKS) + 2}/{len(CHECKS) + 2} tests"
          f"{', side by side' if together else ''}", flush=True)
    for half in notebooks, tests:
        half.start()
        if not together: half.join()
    for half in notebooks, tests: half.join()
    if "No files were eligible for testing" in notebooks.lines: notebooks.code = 1
    for half in notebooks, tests: print(f"{half.name}: {'passed' if half.code == 0 else 'FAILED'} in {half.seconds:.0f} s")
    counts = tests.last_line()
    if re.search(r"\d+ (passed|failed|error)", counts): print(counts)
    return max(bool(notebooks.code), bool(tests.code))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also the tests that are marked slow")
    args = parser.parse_args()
    for number, (title, what) in enumerate(CHECKS.items(), 1): run_check(number, title, what)
    sys.exit(run_halves(args.slow))
