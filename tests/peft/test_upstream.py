"""PEFT's own tests of its methods, with SORSA as the method: as `benchmarks/peft_suite.py` runs them."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.projects import ROOT


@pytest.mark.slow
@pytest.mark.skipif("PEFT_SOURCE" not in os.environ, reason="PEFT_SOURCE names no unpacked source distribution of PEFT")
def test_pefts_own_tests_pass():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peft_suite", "--source", os.environ["PEFT_SOURCE"]],
        cwd=ROOT, text=True, capture_output=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["failed"] == 0
    assert counted["passed"] > 500
