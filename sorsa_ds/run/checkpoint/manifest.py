"""checkpoint.json: everything of a checkpoint but its tensors, and how to tell that they are whole."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sorsa_ds.run.checkpoint.folder import step_of
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_json

FILE = "checkpoint.json"
FORMAT = 1


@dataclass(slots=True)
class Progress:
    """How far a run is, and what it has measured once.

    step: finished optimizer steps; the data of step `step` come next. seconds, tokens: spent and processed so far.
    reg_loss: L_reg before the last of them.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    base_loss: float | None = None
    start_loss: float | None = None
    eval_loss_start: float | None = None
    reg_loss: float | None = None


@dataclass(slots=True)
class Manifest:
    """One checkpoint.

    world_size, zero_stage: those that wrote it; another run may have others.
    scheduler: the learning rate scheduler's own state.
    regularizer: form, reduction and coefficient, as they came out at the start: they do not change with the ranks;
        empty without one.
    config, ds_config: the settings as resolved, and the DeepSpeed JSON as it was given.
    base: digests of the pre-trained parameters. initial_factors: digest of the run's file of them, empty
        where whole weights are trained. data: digest of the
        training examples.
    files: name -> bytes and digest, of every rank's file.
    """

    progress: Progress
    world_size: int
    zero_stage: int
    scheduler: dict
    regularizer: dict
    config: dict
    ds_config: dict
    base: dict[str, str]
    initial_factors: str
    data: str
    versions: dict[str, str]
    files: dict[str, dict] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it, durably."""
        content = {"format": FORMAT, **asdict(self)}
        write_json(folder / FILE, {**content, "digest": _digest(content)})


def read(folder: Path) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        ValueError: it is missing, broken, or of another format.
    """
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("digest") != _digest(found):
            raise ValueError("its content does not fit its digest: damaged")
        if found.pop("format") != FORMAT:
            raise ValueError("written by another version of this program")
        if step_of(folder) != found["progress"]["step"]:
            raise ValueError(f"it is that of step {found['progress']['step']}")
        return Manifest(**{**found, "progress": Progress(**found["progress"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a checkpoint ({error})") from error


def _digest(content: dict) -> str:
    return digest.of_bytes(json.dumps(content, sort_keys=True).encode())


def faults(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files; one `part` of `parts` of them is looked at."""
    found = []
    for name in sorted(manifest.files)[part::parts]:
        path, expected = folder / name, manifest.files[name]
        try:
            if path.stat().st_size != expected["bytes"]:
                found.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}: truncated")
            elif digest.of_file(path) != expected["digest"]:
                found.append(f"{path} is damaged: its digest is not the one that was written down")
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
    return found
