"""The checkpoints of a run as folders: their names, the moment in which one becomes valid, and which are kept."""

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from sorsa_ds.run.paths import CHECKPOINTS, run_of
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.files import fsync, write_text

LATEST, BEST = "latest", "best"
"""Files that name a checkpoint: the newest one, and that of the lowest held-out loss."""
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = re.compile(r"\.step-\d{6,}(\.[0-9a-f]{16})?\.tmp")
"""Names of folders that become checkpoints; those of earlier versions had no random part."""


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def rank_file(checkpoint: Path, rank: int) -> Path:
    """The file that one rank writes into a checkpoint's folder."""
    return checkpoint / f"rank-{rank:05d}.safetensors"


def step_of(checkpoint: Path) -> int:
    """The number of finished optimizer steps that a checkpoint's name tells."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found, checkpoint
    return int(found[1])


def existing_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, newest first; whether their files are undamaged is for `manifest.file_faults` to say."""
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def make_temporary(run: Path, step: int) -> Path:
    """Make an empty folder for a checkpoint to be written into; its name is one that nobody can foresee.

    What killed runs have left unfinished is removed. The caller holds the lock of the run. A run's folder that was
    taken away is not made anew.

    Raises:
        OSError: the folder cannot be made.
    """
    folder = run / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    for leftover in folder.iterdir():
        if _UNFINISHED.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
            if leftover.exists():
                note(f"{leftover}: left by a run that was killed, and cannot be removed")
    temporary = folder / f".step-{step:06d}.{secrets.token_hex(8)}.tmp"
    temporary.mkdir()
    return temporary


def commit_checkpoint(temporary: Path, step: int, keep: int, best: bool = False) -> None:
    """Give a whole checkpoint its name, point `latest` to it, and remove those older than the `keep` newest.

    The best one is not removed.

    At any moment before the renaming the earlier checkpoints are untouched; after it, this one is valid.

    Args:
        temporary: the folder that `make_temporary` has made.
        best: it is the best one from now on.

    Raises:
        OSError: the disk refuses, before the renaming.
    """
    run = run_of(temporary)
    final = checkpoint_path(run, step)
    fsync(temporary)
    os.replace(temporary, final)  # a run that went back has set aside what it had of this step
    fsync(final.parent)
    with suppress(ValueError):  # it is valid now; whoever reads a `latest` that lags behind looks for newer ones too
        write_text(final.parent / LATEST, final.name + "\n", parents=False)
    if best:
        try:
            name_best(run, step)
        except ValueError as error:  # it is valid all the same, and a save that is said to have failed is made again
            note(f"{final.name} is saved, and is not named as the best one: {error}")
    remove_older(run, step, keep)


def remove_older(run: Path, step: int, keep: int) -> None:
    """Remove the checkpoints up to `step` that are older than the `keep` newest of them, but for the best one."""
    kept = best_checkpoint(run)
    for old in [path for path in existing_checkpoints(run) if step_of(path) <= step][keep:]:
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the run's lowest held-out loss; None where none is named, or it is gone."""
    return _named(run, BEST)


def name_best(run: Path, step: int) -> None:
    """Name the checkpoint of a step as the best one; where there is none of that step, no one is the best any more.

    Raises:
        ValueError: the disk refuses.
    """
    path, file = checkpoint_path(run, step), run / CHECKPOINTS / BEST
    if path.is_dir():
        write_text(file, path.name + "\n", parents=False)
        return
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{file}: cannot be removed ({error.strerror})") from error


def _named(run: Path, file: str) -> Path | None:
    """The checkpoint that a file beside the checkpoints names; None where it names none that is there."""
    try:
        name = (run / CHECKPOINTS / file).read_text(encoding="utf-8", errors="backslashreplace").strip()
    except OSError:
        return None
    path = run / CHECKPOINTS / name
    return path if _NAME.fullmatch(name) and path.is_dir() else None


def set_aside_after(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints newer than `step`, from which the run takes another way now; returns their new paths.

    Raises:
        OSError: the disk refuses a renaming.
        ValueError: `latest` cannot be written.
    """
    aside = []
    for path in existing_checkpoints(run):
        if step_of(path) > step:
            number = 1
            while (target := path.with_name(f"set-aside-{number}-{path.name}")).exists():
                number += 1
            os.replace(path, target)
            aside.append(target)
    current = checkpoint_path(run, step)
    write_text(current.parent / LATEST, current.name + "\n", parents=False)
    return aside


def dangling_latest(run: Path) -> str | None:
    """What `latest` says, where it names no checkpoint that is there; None where all is well."""
    try:
        name = (run / CHECKPOINTS / LATEST).read_text(encoding="utf-8", errors="backslashreplace").strip()
    except OSError:
        return None
    return None if _NAME.fullmatch(name) and (run / CHECKPOINTS / name).is_dir() else name
