"""The folder of one run: made by rank 0, held by its lock, with the settings in it."""

import re
import time
from pathlib import Path

import torch

from sorsa_ds.config.schema import OutputConfig, RunConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.run.checkpoint.named import check_unused
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.paths import CONFIG, DS_CONFIG, GIVEN_DS_CONFIG, METRICS
from sorsa_ds.run.ways_on import going_on
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.files import write_json, write_text
from sorsa_ds.runtime.folder_lock import FolderLostError, RunLock


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
