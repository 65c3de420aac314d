"""Runs of the cluster tests: what they need, how one is stopped in a certain step, whether two are the same."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sorsa_ds.model.adapter_file import TRAINED
from tests.helpers.projects import metrics

SECONDS = 240
"""How long anything may take on a busy machine, above what is meant to pass."""


def need(*programs: str) -> None:
    """Skip unless this is root on a machine that has these programs."""
    if os.geteuid() != 0:
        pytest.skip("needs root: makes network namespaces, runs Slurm's daemons")
    missing = [program for program in programs if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; see CONTRIBUTING.md for the packages")


def same(run: Path, other: Path) -> bool:
    """Whether two finished runs have the same losses and factors, bit for bit."""
    assert (run / "report.json").exists()
    factors = [load_file(folder / "adapter" / TRAINED) for folder in (run, other)]
    return metrics(run, "loss") == metrics(other, "loss") and all(
        (factors[0][name] == factors[1][name]).all() for name in factors[1]
    )


class Hold:
    """Stops every rank of a run, once, before it takes a step; until a signal comes or `release` is called.

    environment: for the run.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        folder.mkdir(exist_ok=True)
        # Python runs it at its start; only the ranks know a RANK.
        (folder / "sitecustomize.py").write_text(
            "import os, time\n"
            "from pathlib import Path\n"
            "if rank := os.environ.get('RANK'):\n"
            "    import sorsa_ds.train.trainer as t\n"
            "    step, here = t.Trainer.step, Path(__file__).parent\n"
            "    def held(self, number):\n"
            f"        if number == {step} and not (here / f'held-{{rank}}').exists():\n"
            "            (here / f'held-{rank}').touch()\n"
            "            while not (here / 'go').exists() and not self.signals._received:\n"
            "                time.sleep(0.1)\n"
            "        return step(self, number)\n"
            "    t.Trainer.step = held\n"
        )
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {"PYTHONPATH": ":".join(paths)}

    def wait(self, ranks: int) -> None:
        """Until that many ranks stand still."""
        until = time.monotonic() + SECONDS
        while len(list(self._folder.glob("held-*"))) < ranks:
            assert time.monotonic() < until, "the run does not come to its step"
            time.sleep(0.1)

    def release(self) -> None:
        """Let them go on."""
        (self._folder / "go").touch()


def last_lines(log: Path) -> str:
    """The end of a log, for a failed assertion."""
    return json.dumps(log.read_text()[-3000:]) if log.exists() else f"no {log}"
