"""One run of a comparison: launch/train.py in processes of its own, started by DeepSpeed's launcher."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sorsa_ds.config.command_line import to_yaml
from sorsa_ds.config.differences import FREE_OF_ONE_MODEL, differences
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.paths import CHECKPOINTS, GIVEN_DS_CONFIG
from sorsa_ds.runtime.errors import Preempted
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.json_text import read_json
from sorsa_ds.runtime.leave import receiving
from sorsa_ds.runtime.ports import free_port
from sorsa_ds.runtime.shipped import SHIPPED
from sorsa_ds.study.compare.trials import RUNS, Trial

LOGS, SETTINGS = "logs", "settings"
_SECONDS = 0.5


@dataclass(slots=True)
class Runner:
    """Makes a comparison's runs.

    base: settings that they share. output: the comparison's folder. num_gpus: the launcher's option; None: its own
    choice. told_to_stop: name of the signal that this process has received, if any.
    """

    base: RunConfig
    ds_config: Path
    output: Path
    num_gpus: int | None
    told_to_stop: str | None = field(default=None, init=False)

    def folder(self, trial: Trial) -> Path:
        """The folder of a run."""
        return self.output / RUNS / trial.name

    def is_finished(self, trial: Trial) -> bool:
        """Whether a run came to its end."""
        return RunState(self.folder(trial)).is_finished

    def check_unchanged(self, trial: Trial) -> None:
        """Stop where a run exists already that was made with other settings.

        Raises:
            ValueError: the message names what differs.
        """
        folder = self.folder(trial)
        run = RunState(folder)
        if not run.is_run:
            return
        changed = differences(trial.config(self.base, self.output), run.saved_settings(), FREE_OF_ONE_MODEL)
        listing = [f"{name} was {then!r} and is now {now!r}" for name, (then, now) in changed.items()]
        if run.is_finished and _json(folder / GIVEN_DS_CONFIG) != _json(self.ds_config):
            listing.append(f"the DeepSpeed JSON was another ({folder / GIVEN_DS_CONFIG})")
        if listing:
            raise ValueError(
                f"--output: {folder} was made with other settings: {'; '.join(listing)}; choose another --output"
            )

    def make_run(self, trial: Trial, progress: Callable[[int], None]) -> str | None:
        """Begin a run, or go on with it, until it is finished. Its checkpoints are removed then.

        Args:
            progress: is called with the number of finished steps whenever there are more.

        Returns:
            why the run failed; None where it is finished.

        Raises:
            Preempted: this process was told to stop, and the run has saved itself.
        """
        settings = self.output / SETTINGS / f"{trial.name}.yaml"
        write_text(settings, to_yaml(trial.config(self.base, self.output)))
        arguments = ["--ds_config", str(self.ds_config), "--config", str(settings), "--resume", "auto"]
        shown = 0

        def follow() -> None:
            nonlocal shown
            if (steps := self._steps(trial)) > shown:
                progress(shown := steps)

        failure = self.launch("train.py", arguments, trial.name, follow)
        if failure is None:
            shutil.rmtree(self.folder(trial) / CHECKPOINTS, ignore_errors=True)
        return failure

    def launch(self, script: str, arguments: list[str], name: str, meanwhile: Callable[[], None]) -> str | None:
        """Run one of the launch/ commands through DeepSpeed's launcher; what it prints goes to logs/NAME.log.

        The command gets a session of its own. A Ctrl-C at the terminal reaches this process alone, which passes it on
        to the ranks as the signal on which they save.

        Args:
            meanwhile: is called again and again while the command runs.

        Returns:
            why the command failed; None where it has succeeded.

        Raises:
            Preempted: this process was told to stop, and the command has ended in good order.
        """
        log = self.output / LOGS / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            *(["--num_gpus", str(self.num_gpus)] if self.num_gpus else []),
            *("--master_port", str(free_port())),
            str(SHIPPED / "launch" / script), *arguments,
        ]  # fmt: skip
        with log.open("a", encoding="utf-8") as printed, receiving(self._note):
            begin = printed.tell()
            if self.told_to_stop is None:
                process = subprocess.Popen(command, stdout=printed, stderr=printed, start_new_session=True)
                while process.poll() is None:
                    if self.told_to_stop is not None:
                        _stop(process)
                        break
                    meanwhile()
                    time.sleep(_SECONDS)
            if self.told_to_stop is not None:
                raise Preempted(f"{self.told_to_stop}: stopped in {name}; the same command goes on")
        return None if process.returncode == 0 else _reason(log, begin, process.returncode)

    def _steps(self, trial: Trial) -> int:
        return max((line["step"] for line in read_metrics(self.folder(trial)) if "loss" in line), default=0)

    def _note(self, signal_name: str) -> None:
        """Note a signal, which ends the command at work and not this process at once."""
        self.told_to_stop = signal_name


def _stop(launcher: subprocess.Popen) -> None:
    """Ask the ranks to save and leave, because DeepSpeed's launcher passes no signals on, and wait for the launcher."""
    with contextlib.suppress(psutil.Error):  # some of the processes may have just ended
        family = psutil.Process(launcher.pid).children(recursive=True)
        ranks = [process for process in family if any(word.startswith("--local_rank") for word in process.cmdline())]
        told: list[psutil.Process | subprocess.Popen] = [*ranks] or [launcher, *family]
        for process in told:
            process.terminate()
    launcher.wait()


def _reason(log: Path, begin: int, code: int) -> str:
    """The error that a command has printed, or its last line, and the file that holds all of its output."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        lines = [line.strip() for line in file if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    told = errors[0].removeprefix("error: ") if errors else f"exit code {code}: {lines[-1] if lines else 'silent'}"
    return f"{told} ({log})"


def _json(path: Path) -> dict | None:
    return read_json(path) if path.exists() else None
