"Commands as processes of their own, forked from one that has imported everything: they start at once, and die in earnest."
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vitdynconv.train.session", "vitdynconv.train.evaluate", "vitdynconv.train.ending", "matplotlib.backends.backend_agg"])
COMMANDS = {"vdc_train": "run", "vdc_eval": "evaluate", "vdc_predict": "prediction", "vdc_export": "export"}


def run_here(command, words, folder, out, errors, environment):
    "In the child: become the console script."
    for number, path in (1, out), (2, errors): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [command, *words]
    getattr(importlib.import_module(f"vitdynconv.train.{COMMANDS[command]}"), command)()


def free_port():
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def environments(processes):
    "What torchrun tells each of its processes."
    if processes == 1: return [{}]
    common = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    return [common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


class Running:
    "A command in one process or in several that work together; the way `subprocess.Popen` shows one."
    def __init__(self, folder, *words, processes=1, command="vdc_train"):
        place = Path(tempfile.mkdtemp())
        self.out, self.errors = place / "out", place / "errors"
        self.parts = []
        for environment in environments(processes):
            arguments = command, [str(word) for word in words], str(folder), str(self.out), str(self.errors), environment
            part = CONTEXT.Process(target=run_here, args=arguments)
            part.start()
            self.parts.append(part)

    @property
    def pids(self): return [part.pid for part in self.parts]
    @property
    def output(self): return self.out.read_text() if self.out.exists() else ""
    @property
    def said(self): return self.errors.read_text() if self.errors.exists() else ""
    @property
    def code(self): return next((part.exitcode for part in self.parts if part.exitcode), 0)
    @property
    def lives(self): return any(part.is_alive() for part in self.parts)

    def signal(self, number, which=0): os.kill(self.pids[which], number)

    def wait_until(self, true):
        "Wait, while it lives, for something to become true."
        while not true():
            assert self.lives, self.said
            time.sleep(0.02)

    def wait_for(self, first):
        "Wait for a line that begins with the word `first`."
        self.wait_until(lambda: any(line.split()[:1] == [first] for line in self.output.splitlines()))

    def end(self, timeout=300):
        "Wait for the end: (exit code, output, errors)."
        last = time.monotonic() + timeout
        for part in self.parts: part.join(max(0, last - time.monotonic()))
        for part in self.parts:
            if part.is_alive(): part.kill()
        assert all(part.exitcode is not None for part in self.parts) or not self.parts, f"no end within {timeout} seconds: {self.output} {self.said}"
        return self.code, self.output, self.said


def run(folder, *words, **options):
    "A finished command: (exit code, output, errors)."
    return Running(folder, *words, **options).end()
