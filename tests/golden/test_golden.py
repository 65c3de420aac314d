"""Not a bit of training moves: short runs, compared exactly with what they gave before (`tests/golden/run.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.run import differences

PROGRAM = Path(__file__).with_name("run.py")


@pytest.mark.slow
def test_losses_norms_and_factors_are_the_golden_ones_to_the_last_bit():
    done = subprocess.run([sys.executable, str(PROGRAM)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["golden_equal"] is True


def test_a_number_that_differs_in_its_last_bit_is_found():
    golden = {"a": {"loss": [1.0, 2.0], "factors": "x"}, "b": {"loss": [3.0]}}
    assert differences(golden, golden) == []
    moved = {"a": {"loss": [1.0, 2.0000000000000004], "factors": "x"}, "b": {"loss": [3.0]}}
    assert len(differences(moved, golden)) == 1
    assert len(differences({"a": golden["a"]}, golden)) == 1
