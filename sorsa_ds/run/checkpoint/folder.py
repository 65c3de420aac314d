"""The checkpoints of a run as folders: their names, the moment in which one becomes valid, and which are kept."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from sorsa_ds.run.paths import CHECKPOINTS
from sorsa_ds.runtime.files import fsync, write_text

LATEST = "latest"
_NAME = re.compile(r"step-(\d{6,})")


def path_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def temporary_of(run: Path, step: int) -> Path:
    """Where it is written before it is whole."""
    return run / CHECKPOINTS / f".step-{step:06d}.tmp"


def step_of(path: Path) -> int:
    """Its number of finished optimizer steps."""
    found = _NAME.fullmatch(path.name)
    assert found, path
    return int(found[1])


def existing(run: Path) -> list[Path]:
    """The run's checkpoints, newest first; whether they are whole is for `manifest.faults` to say."""
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def clear(run: Path, step: int) -> None:
    """Make an empty temporary folder for a checkpoint; what killed runs left unfinished is removed.

    Raises:
        OSError: it cannot be made.
    """
    temporary = temporary_of(run, step)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def commit(run: Path, step: int, keep: int) -> None:
    """Give a whole checkpoint its name, point `latest` to it, and remove those older than the `keep` newest.

    At any moment before the renaming the earlier checkpoints are untouched; after it, this one is valid.

    Raises:
        OSError: the disk refuses.
    """
    temporary, final = temporary_of(run, step), path_of(run, step)
    fsync(temporary)
    os.replace(temporary, final)  # a run that went back has set aside what it had of this step
    fsync(final.parent)
    with suppress(ValueError):  # it is valid now; whoever reads a `latest` that lags behind looks for newer ones too
        write_text(final.parent / LATEST, final.name + "\n")
    for old in [path for path in existing(run) if step_of(path) <= step][keep:]:
        shutil.rmtree(old, ignore_errors=True)


def set_aside_after(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints newer than `step`, from where a run is continued on another way; returns them."""
    aside = []
    for path in existing(run):
        if step_of(path) > step:
            number = 1
            while (target := path.with_name(f"set-aside-{number}-{path.name}")).exists():
                number += 1
            os.replace(path, target)
            aside.append(target)
    write_text(path_of(run, step).parent / LATEST, path_of(run, step).name + "\n")
    return aside


def dangling_latest(run: Path) -> str | None:
    """What `latest` says, if it names no checkpoint that is there."""
    try:
        name = (run / CHECKPOINTS / LATEST).read_text(encoding="utf-8", errors="backslashreplace").strip()
    except OSError:
        return None
    return None if _NAME.fullmatch(name) and (run / CHECKPOINTS / name).is_dir() else name
