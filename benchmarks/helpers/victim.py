"""A small run that is killed, damaged and disturbed, and the undisturbed one with which it is compared."""

import contextlib
import subprocess
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.helpers.common import DS_CONFIGS, ROOT, launch_environment, train_command, write_small_llama
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.paths import ADAPTER
from sorsa_ds.runtime.folder_lock import is_held
from sorsa_ds.runtime.ports import free_port

TRAINED = "trained_factors.safetensors"
SAVE_EVERY = 2
"""Steps between checkpoints."""
SECONDS = 900
"""The longest that anything may take, on a machine that is busy with other work too."""
UNDISTURBED = "undisturbed"


class Project:
    """A small random model, and the command that trains it on two ranks under ZeRO-3."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        folder.mkdir()
        self._started: list[subprocess.Popen] = []
        write_small_llama(folder / "model")

    def start(self, name: str, script: bool = False, port: int | None = None) -> subprocess.Popen:
        """Start a run, or go on with it where it was begun.

        script: through launch/multi_gpu.sh instead of the bare `deepspeed`. port: where the ranks meet.
        """
        port = free_port() if port is None else port
        words = (
            f"model={self.folder / 'model'}", f"train.steps={self.steps}",
            "adapter.rank=32", "adapter.dropout=0.1", "train.precision=fp32", "train.micro_batch_size=1",
            "data.max_length=128", "data.eval_size=2", f"output.save_every={SAVE_EVERY}", "train.max_start_gap=1",
            f"output.folder={self.folder}", f"output.name={name}", "--resume", "auto",
        )  # fmt: skip
        command = train_command(2, DS_CONFIGS / "zero3.json", *words, port=port)
        if script:
            command = [str(ROOT / "launch" / "multi_gpu.sh"), "--ranks", "2", "--port", str(port)]
            command += ["--ds_config", str(DS_CONFIGS / "zero3.json"), *words]
        environment = launch_environment() | {"DS_ACCELERATOR": "cpu"}  # where sums are the same bit for bit
        log = (self.folder / f"{name}.log").open("a")
        self._started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        return self._started[-1]

    def end_all(self) -> None:
        """Kill what is left of all runs that were started."""
        for process in self._started:
            if process.poll() is None:
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                process.wait()
        self._started.clear()

    def train(self, name: str) -> None:
        """Train a run to its end.

        Raises:
            RuntimeError: the run failed.
        """
        if self.start(name).wait(SECONDS):
            raise RuntimeError(f"{name} failed:\n{self.told(name)[-3000:]}")

    def told(self, name: str) -> str:
        """Everything that the run has printed."""
        return (self.folder / f"{name}.log").read_text()

    def same(self, name: str) -> bool:
        """Whether a run has the same losses and factors as the undisturbed one."""
        runs = [self.folder / name, self.folder / UNDISTURBED]
        losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in runs]
        factors = [load_file(run / ADAPTER / TRAINED) for run in runs]
        return losses[0] == losses[1] and all(torch.equal(factors[0][key], factors[1][key]) for key in factors[1])

    def steps_of(self, name: str) -> int:
        """The last step in a run's log; 0 where the log cannot be read, as while a line is being written."""
        try:
            return max((line["step"] for line in read_metrics(self.folder / name)), default=0)
        except (OSError, ValueError):
            return 0

    def wait_for_step(self, name: str, process: subprocess.Popen, steps: int) -> bool:
        """Wait until a run has made so many steps since it was started; returns False if it ended first."""
        until, first = time.monotonic() + SECONDS, None
        while process.poll() is None and time.monotonic() < until:
            # A run holds its lock while it trains, and has then cut off what a killed run left behind in its metrics.
            step = self.steps_of(name) if is_held(self.folder / name) else 0
            first = step if step and first is None else first
            if first is not None and step >= first + steps:
                return True
            time.sleep(0.01)
        return False


def wait_for_all(family: list[psutil.Process]) -> bool:
    """Wait for processes, whosever children they are; returns whether all have ended."""
    return not psutil.wait_procs(family, SECONDS)[1]
