"Every command: its line is read before anything slow is imported, its answers are one line, its help is complete."
import importlib
import inspect
import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SCRIPTS = dict(script.split("=") for script in SETTINGS["DEFAULT"]["console_scripts"].split())
SLOW_TO_IMPORT = "timm", "fastai", "torchvision", "pandas", "matplotlib", "sklearn", "scipy", "fvcore", "accelerate"

RUN = """
import json, os, sys
sys.argv = [{name!r}, *{words!r}]
from {module} import {function} as command
try: command()
except SystemExit as end: code = end.code or 0
print(json.dumps([code, [name for name in {slow!r} if name in sys.modules]]))
"""


def run(name, *words):
    "What a console script does with a command line: exit code, slow imports, its output and its errors."
    module, function = SCRIPTS[name].split(":")
    code = RUN.format(name=name, words=words, module=module, function=function, slow=SLOW_TO_IMPORT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    *output, last = done.stdout.splitlines()
    return *json.loads(last), "\n".join(output), done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_typing_error_is_answered_before_anything_slow_is_imported(name):
    code, slow, output, said = run(name, "--ouput", "x")
    assert code == 2 and not output
    assert said.count("\n") == 1 and said.startswith(f"{name}: there is no option --ouput")
    assert not slow, f"the module of {name} imports {slow} before it reads the command line"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_and_explains_every_option(name):
    code, slow, output, said = run(name, "--help")
    assert code == 0 and not said and not slow
    module, function = SCRIPTS[name].split(":")
    command = getattr(importlib.import_module(module), function)
    help_text = " ".join(output.split())
    assert command.__doc__.split(".")[0].split(",")[0] in help_text
    from vitdynconv.tools.cli import options_of
    for option in options_of(inspect.unwrap(command)):
        assert option.flag in output or option.required
        assert option.help, f"{name} {option.flag} is not explained"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_number_is_answered_at_once(name):
    from vitdynconv.tools.cli import options_of
    module, function = SCRIPTS[name].split(":")
    command = inspect.unwrap(getattr(importlib.import_module(module), function))
    numbers = [option for option in options_of(command) if option.type in (int, float)]
    for option in numbers[:1]:
        code, slow, output, said = run(name, option.flag, "many")
        assert code == 2 and not slow and not output
        assert said.count("\n") == 1 and f"argument {option.flag}: 'many' is not a" in said
