"""The folder of one run, and everything that is logged into it; written by rank 0 alone."""

import json
import re
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from sorsa_ds.config.schema import OutputConfig, RunConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.run.checkpoint.named import check_unused
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.paths import CONFIG, DS_CONFIG, GIVEN_DS_CONFIG, INIT, METRICS, REPORT
from sorsa_ds.run.ways_on import going_on
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.extras import check_extra
from sorsa_ds.runtime.files import write_json, write_text
from sorsa_ds.runtime.folder_lock import FolderLostError, RunLock
from sorsa_ds.runtime.json_text import finite_json, parse_json


def make_run_folder(output: OutputConfig, model: str, method: str, device: torch.device, again: bool) -> Path:
    """Make the folder of a new run, the same on every rank. A collective call.

    Args:
        again: a run of that name that never saved a checkpoint may begin anew.

    Raises:
        ValueError: a folder of that name holds a run already, or it cannot be written. The message has the command that
            leads on.
    """
    model_name = re.sub(r"[^\w.-]", "-", model.rstrip("/").rpartition("/")[2])
    proposal = output.name or f"{model_name}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = collectives.gather_json(proposal)[0]  # the ranks' clocks may differ
    folder = Path(output.folder).expanduser().resolve() / name

    def make() -> None:
        if not again:
            check_unused(RunState(folder))
        write_text(folder / METRICS, "")

    collectives.together(make, device, on=0)
    return folder


def write_settings(folder: Path, config: RunConfig, ds_config: dict, given: dict) -> None:
    """Write the settings of a run into its folder.

    Args:
        config: the settings as resolved.
        ds_config: the DeepSpeed JSON as resolved.
        given: the DeepSpeed JSON as it was given.

    Raises:
        ValueError: a file cannot be written.
    """
    write_text(folder / CONFIG, to_yaml(config))
    write_json(folder / DS_CONFIG, ds_config)
    write_json(folder / GIVEN_DS_CONFIG, given)


def lock_run_folder(folder: Path, device: torch.device) -> RunLock:
    """Mark a run's folder as worked on, until the lock is released or this process ends. A collective call.

    Raises:
        ValueError: another process works on it.
    """
    lock = RunLock(folder)
    collectives.together(lock.acquire, device, on=0)
    return lock


def check_still_held(lock: RunLock, device: torch.device) -> None:
    """Stop all ranks where the run's folder has been removed, renamed or replaced. A collective call.

    Raises:
        ValueError: on rank 0; where the folder was renamed, with the command that goes on with the run.
        PeerError: on the other ranks.
    """

    def check() -> None:
        try:
            lock.check()
        except FolderLostError as lost:
            way_on = f"; to go on with the run: {going_on(lost.now)}" if lost.now else ""
            raise ValueError(f"{lost}{way_on}") from lost

    collectives.together(check, device, on=0)


class RunLog:
    """Metrics to metrics.jsonl and, if asked, to Weights & Biases. On ranks other than 0 it does nothing.

    Args:
        folder: the run's.
        config: the settings as resolved.
        ds_config: the DeepSpeed JSON as resolved.
        given: the DeepSpeed JSON as it was given.
        initialised: what init.json will hold; None where a run is continued, whose file stays.
        steps_done: finished steps of the run. Lines of later steps, which a run that was killed has left, are removed,
            and so is the evaluation after that step, which is made again.

    Raises:
        ValueError: a file of the folder cannot be written, or the metrics in it are damaged; on rank 0 alone.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: RunConfig,
        ds_config: dict,
        given: dict,
        initialised: dict | None,
        steps_done: int,
    ):
        self.folder = folder
        self._file: TextIO | None = None
        self._wandb: Any = None
        if collectives.rank() != 0:
            return
        write_settings(folder, config, ds_config, given)  # a run that goes on may have others than before
        if initialised is not None:
            write_json(folder / INIT, initialised)
        kept = [line for line in read_metrics(folder) if _is_kept(line, steps_done, config.train.eval_every)]
        write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if config.output.wandb != "off":
            self._wandb = _wandb_run(folder, config)

    def write(self, step: int, **values: float | None) -> None:
        """Log one line; `step` is the number of finished optimizer steps. Values that are None are left out.

        Raises:
            ValueError: a value is NaN or infinite; the message names it and the step.
        """
        if self._file is None:
            return
        values = {key: value for key, value in values.items() if value is not None}
        try:
            line = finite_json({"step": step, **values})
        except ValueError as error:
            raise ValueError(f"{self.folder / METRICS}: step {step} is not logged: {error}") from error
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            note(f"{self.folder / METRICS}: step {step} is not logged ({error.strerror})")
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def losses(self) -> list[float]:
        """The training losses logged so far."""
        return [line["loss"] for line in read_metrics(self.folder) if "loss" in line] if self._file else []

    def close(self, report: dict | None) -> None:
        """End the logs. A run that came to its end gives its report, which is written too."""
        if self._file is None:
            return
        with suppress(OSError):  # the disk may still refuse a line that was not logged
            self._file.close()
        if report is not None:
            write_json(self.folder / REPORT, report, parents=False)
        if self._wandb is not None:
            self._wandb.summary.update(report or {})
            self._wandb.finish(exit_code=0 if report else 1)


def _wandb_run(folder: Path, config: RunConfig) -> Any:
    """The run on Weights & Biases, or in its local files.

    Raises:
        ValueError: wandb is not installed, refuses, or cannot reach its server.
    """
    mode = config.output.wandb
    assert mode != "off"
    check_extra("wandb", f"output.wandb={mode}")
    import wandb

    try:
        return wandb.init(
            project=config.output.wandb_project,
            name=folder.name,
            id=re.sub(r"[^\w-]", "-", folder.name),
            resume="allow",
            dir=folder,
            mode=mode,
            config=asdict(config),
        )
    except Exception as error:  # its client, the network and the server fail in many ways
        raise ValueError(
            f"output.wandb={mode}: {error}\noutput.wandb=offline writes local files, which `wandb sync` "
            f"uploads later; output.wandb=off leaves it out"
        ) from error


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; the last one is left out if a kill has cut it.

    Raises:
        ValueError: a line is not one that a run logs; the message names it.
    """
    path = folder / METRICS
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    read: list[dict] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            read.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); the file is damaged") from error
        if not isinstance(read[-1], dict) or not isinstance(read[-1].get("step"), int):
            raise ValueError(f"{path}, line {number}: has no step; the file is damaged")
    return read


def _is_kept(line: dict, steps_done: int, eval_every: int) -> bool:
    """Whether a line of the log stays when a run goes on after `steps_done` steps, and maybe measures them again."""
    if line["step"] == steps_done:
        measured_again = steps_done == 0 or (eval_every > 0 and steps_done % eval_every == 0)
        return "loss" in line or not measured_again
    return line["step"] < steps_done
