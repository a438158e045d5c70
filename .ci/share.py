"""Several processes of pytest share the tests: each takes a file that nobody has, until there is none left.

    share.py FOLDER [options of pytest]

FOLDER holds a file for each test file that was taken, and what every process counted. `.ci/tests.py` starts the processes."""
import json, os, sys, time
from pathlib import Path

import pytest

# Over a minute each, the longest first: at the end only short ones are left, and all processes stop at about the same time.
LONG = ["the site", "test_timm_suite.py", "test_practitioner.py", "test_walks.py", "test_models.py", "test_weights.py", "test_train.py",
        "test_learner.py", "test_project.py", "test_fast.py", "test_distributed.py", "test_tutorials.py", "test_cost.py", "test_beyond.py"]


def group_of(item):
    "The file of a test. What looks at the site, which takes a minute to make, stays together."
    return "the site" if "site" in getattr(item, "fixturenames", ()) else item.nodeid.partition("::")[0]


def in_order(items):
    "Group -> its tests, the long groups first."
    groups = {}
    for item in items: groups.setdefault(group_of(item), []).append(item)
    place = lambda name: LONG.index(Path(name).name) if Path(name).name in LONG else len(LONG)
    return {name: groups[name] for name in sorted(groups, key=place)}


class Share:
    "A pytest plugin that runs what this process takes, with one line for each file."
    def __init__(self, folder):
        self.folder, self.run = Path(folder), 0

    def take(self, name):
        "Is this group ours? The first process that makes its file has it."
        try: (self.folder/(name.replace("/", "+") + ".taken")).open("x").close()
        except FileExistsError: return False
        return True

    def ours(self):
        "The tests that this process runs; a group is taken before the last test of the one before, as pytest asks what follows."
        for name, items in self.groups.items():
            if self.take(name): yield from items

    def pytest_configure(self, config): self.config = config

    def say(self, line): self.config.pluginmanager.get_plugin("terminalreporter").write_line(line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed: raise session.Interrupted(f"{session.testsfailed} errors during collection")
        self.groups = in_order(session.items)
        tests, began = self.ours(), time.time()
        test = next(tests, None)
        while test is not None:
            following = next(tests, None)  # pytest takes down what the next test does not need
            test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            if session.shouldfail: raise session.Failed(session.shouldfail)
            if session.shouldstop: raise session.Interrupted(session.shouldstop)
            if following is None or group_of(following) != group_of(test):
                self.tell(group_of(test), time.time() - began)
                began = time.time()
            test = following
        return True

    def tell(self, name, seconds):
        "A line about a group that is done."
        count, taken = len(self.groups[name]), len(list(self.folder.glob("*.taken")))
        self.run += count
        self.say(f"{name}: {count} tests in {seconds:.0f} s ({taken} of {len(self.groups)} taken)")

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self):
        "No dots."
        category, _, _ = yield
        return category, "", ""

    def pytest_runtest_logreport(self, report):
        if report.failed: self.say(f"FAILED {report.nodeid}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        "What was counted; a process that dies leaves nothing."
        stats = self.config.pluginmanager.get_plugin("terminalreporter").stats
        kinds = {kind: len(reports) for kind, reports in stats.items() if kind and kind != "warnings"}
        counts = dict(kinds=kinds, run=self.run, collected=len(session.items))
        (self.folder/f"{os.getpid()}.counts").write_text(json.dumps(counts))


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as `python -m pytest` has it
    sys.exit(pytest.main(["-o", "console_output_style=classic", *sys.argv[2:]], plugins=[Share(sys.argv[1])]))
