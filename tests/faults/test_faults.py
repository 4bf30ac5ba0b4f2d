"""The planted faults can still be planted: `make mutations` and `make cuda-faults` take long, this shows it at once."""

import re
import subprocess

import pytest

from tests.faults import cuda_faults, mutations
from tests.faults.planting import ROOT, Fault, fate, lost, main

FAULTS = [*mutations.FAULTS, *cuda_faults.FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_fault_can_be_planted(fault):
    assert not lost([fault])
    assert fault.new != fault.old
    files = [argument for argument in fault.tests if argument.endswith(".py")]
    assert files and all((ROOT / file).is_file() for file in files), fault.tests


def test_each_reason_why_factors_cease_to_hold_has_a_test_and_a_planted_fault():
    table = (ROOT / "genft_kernels" / "sharing" / "README.md").read_text().partition("| planted fault |\n")[2]
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert len(rows) > 10
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "sharing").glob("test_*.py"))
    names = {fault.what for fault in FAULTS}
    for reason, _, held_by, planted in rows:
        named = re.findall(r"`(test_\w+)`", held_by)
        assert named and all(f"def {test}(" in tests for test in named), reason
        assert set(planted.split("; ")) <= names, reason


def test_lost_fault_is_named():
    here = "tests/faults/planting.py"
    assert lost([Fault("gone", here, "no such " + "text", "", [])]) == [f"gone: its text occurs 0 times in {here}"]
    assert "occurs 0 times in no/such.py" in lost([Fault("gone", "no/such.py", "text", "", [])])[0]
    assert "its text occurs " in lost([Fault("twice", here, "import", "", [])])[0]


def test_fault_that_no_test_looks_at_is_not_caught(tmp_path):
    (tmp_path / "file.py").write_text("right")
    ends = {0: "SURVIVED", 1: "caught", 5: "NO TEST RAN"}  # pytest's exit statuses
    for status, expected in ends.items():
        run = lambda folder, tests, status=status: subprocess.CompletedProcess(tests, status, "", "")  # noqa: E731
        assert fate(Fault("", "file.py", "right", "wrong", []), tmp_path, run)[0] == expected
    assert (tmp_path / "file.py").read_text() == "right"


@pytest.mark.parametrize("words, status", [("", 1), ("here", 0), ("gone", 1), ("here gone", 1), ("nowhere", 0)])
def test_words_choose_faults(words, status):
    there = "tests/faults/__init__.py"
    faults = [Fault("gone", "no/such.py", "", "", []), Fault("here", there, (ROOT / there).read_text(), "", [])]
    assert main(faults, argv=[*words.split(), "--check"]) == status
