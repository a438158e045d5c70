"The list of deliberate mistakes fits the library as it is; `python tests/mutants.py` runs it."
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))
import mutants


def test_every_mutant_can_be_made():
    assert mutants.missing() == []


def test_every_mutant_names_tests_that_exist():
    for mutant in mutants.MUTANTS:
        assert (ROOT / "tests" / mutant.tests.split()[0]).is_file(), mutant.title


def test_there_are_mutants_of_every_kind():
    areas = [mutant.area for mutant in mutants.MUTANTS]
    assert len(areas) >= 30 and set(areas) == {"mathematics", "framework", "training", "data", "counting", "surgery", "road"}
