"""checkpoint.json: everything of a checkpoint but its tensors, and how to tell that the tensors are whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from sorsa_ds.config.declare import Amount, BatchSize, Digest, NonNegativeInt, PositiveInt
from sorsa_ds.config.fields import leaves, sections
from sorsa_ds.config.renamed import renamed_sections
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.typed_json import typed
from sorsa_ds.config.yaml_io import Given, check_value
from sorsa_ds.model.adapter_file import INITIAL
from sorsa_ds.run.best import BestSoFar, Finite
from sorsa_ds.run.checkpoint.folder import step_of
from sorsa_ds.run.paths import ADAPTER
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_json
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.sorsa.regularizer import Regularizer

FILE = "checkpoint.json"
FORMAT = 1
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""The name of a file in the checkpoint's own folder."""


@dataclass(slots=True)
class RunProgress:
    """How far a run is, and what it has measured once.

    step: number of finished optimizer steps, which is also the index of the data that come next.
    seconds, tokens: the seconds spent and the tokens processed so far.
    base_loss: the pre-trained model's loss at step 0; None before it is measured.
    start_loss: the adapted model's loss at step 0; None before it is measured.
    reg_loss: L_reg before the last finished step.
    eval_losses_start: held-out loss at step 0 of each source of the data, where there are several.
    stream: where streamed data go on; None where the step alone says it.
    best: the lowest held-out loss so far, and for how long it has not fallen.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    step: NonNegativeInt = 0
    seconds: Amount = 0.0
    tokens: Amount = 0.0
    base_loss: Finite | None = None
    start_loss: Finite | None = None
    eval_loss_start: Finite | None = None
    reg_loss: Amount | None = None
    eval_losses_start: dict[str, Finite] = field(default_factory=dict)
    stream: dict[str, Any] | None = None
    best: BestSoFar = field(default_factory=BestSoFar)

    @property
    def started(self) -> bool:
        """Whether the model at step 0 has been measured, which comes before the first step."""
        return self.base_loss is not None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Context whose time is added to `seconds` when its body ends without an error."""
        began = perf_counter()
        yield
        self.seconds += perf_counter() - began


@dataclass(slots=True, kw_only=True)
class Manifest:
    """The description of one checkpoint.

    progress: how far the run was.
    world_size: the number of ranks that wrote it; the run that goes on may have another.
    zero_stage: the ZeRO stage of the run that wrote it; the run that goes on may have another.
    scheduler: the learning rate scheduler's own state.
    regularizer: form, reduction and coefficient as they were resolved when the run began: they do not change with the
        number of ranks. Empty without a regulariser.
    config, ds_config: the settings as resolved, and the DeepSpeed JSON as it was given.
    base: digests of the pre-trained parameters.
    initial_factors: digest of the run's file of initial factors; empty where whole weights are trained.
    data: digest of the training examples.
    versions: the versions of Python packages, by name.
    numerics: what decides the base model's numbers besides its weights (`model.numerics`); empty in older checkpoints.
    files: name -> bytes and digest, of every rank's file.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    progress: RunProgress
    world_size: PositiveInt
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    scheduler: dict[str, bool | int | Finite | list[Finite] | list[dict[str, Any] | None]]
    regularizer: dict[str, Any]
    config: dict[str, Any]
    ds_config: dict[str, Any]
    base: dict[str, Digest]
    initial_factors: Digest | Literal[""]
    data: Digest
    versions: dict[str, str]
    numerics: dict[str, Any] = field(default_factory=dict)
    files: dict[FileName, dict[str, Any]] = field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Write the manifest into a checkpoint's folder, durably."""
        content = {"format": FORMAT, **asdict(self)}
        write_json(checkpoint / FILE, {**content, "digest": _digest_of(content)}, parents=False)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        ValueError: the file is missing, broken, or of another format.
    """
    path = checkpoint / FILE
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("digest", None) != _digest_of(found):
            raise ValueError("its content does not fit its digest: damaged")
        if found.pop("format", None) != FORMAT:
            raise ValueError("written by another version of this program")
        manifest = typed(Manifest, found)
        manifest.config = renamed_sections(manifest.config)
        if step_of(checkpoint) != manifest.progress.step:
            raise ValueError(f"it is that of step {manifest.progress.step}")
        _check_sections(manifest)
        return manifest
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint ({error})") from error


@dataclass(frozen=True, slots=True)
class _SavedFile:
    """An entry of `Manifest.files`."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(ge=0)]
    digest: Digest


@dataclass(frozen=True, slots=True)
class _SavedBatch:
    """The batch of `Manifest.config`, which is split anew where the number of ranks has changed."""

    global_batch_size: BatchSize
    micro_batch_size: BatchSize


def _check_sections(manifest: Manifest) -> None:
    """Check what stands in the sections of a manifest.

    Settings that this version does not know are not looked at: another version may have written them.

    Raises:
        ValueError: an entry has another type, or lies outside its range; the message names it.
    """
    if manifest.scheduler.get("last_epoch") != manifest.progress.step:
        raise ValueError("scheduler: it is that of another step")
    if manifest.regularizer:
        typed(Regularizer, manifest.regularizer)
    for name, entry in manifest.files.items():
        with _named(f"files.{name}"):
            typed(_SavedFile, entry)
    with _named("config.train"):
        typed(_SavedBatch, manifest.config.get("train"))
    for name in sections(RunConfig):
        if not isinstance(manifest.config.get(name, {}), dict):
            raise ValueError(f"config.{name}: is no section")
    for path, leaf in leaves(RunConfig).items():
        section, _, name = path.rpartition(".")
        holder = manifest.config.get(section, {}) if section else manifest.config
        if name in holder:
            check_value(leaf, Given(holder[name], None, "config"))


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Context that puts the name of a place in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def file_faults(checkpoint: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, in words; empty where they are whole.

    Args:
        part, parts: every rank may look at its part of the files, number `part` of `parts`.
    """
    found = []
    for name in sorted(manifest.files)[part::parts]:
        path, expected = checkpoint / name, manifest.files[name]
        try:
            if path.stat().st_size != expected["bytes"]:
                found.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}: truncated")
            elif digest.of_file(path) != expected["digest"]:
                found.append(f"{path} is damaged: its digest is not the one that was written down")
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
    return found


def digest_of_initial(run: Path) -> str:
    """The digest of a run's file of initial factors; empty where there is none."""
    initial = run / ADAPTER / INITIAL
    return digest.of_file(initial) if initial.exists() else ""


def _digest_of(content: dict) -> str:
    return digest.of_bytes(json.dumps(content, sort_keys=True).encode())
