"""Continuing a run: which checkpoint, whether it is whole, and whether the settings still fit it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import yaml

from sorsa_ds.config.differences import FREE_OF_ONE_MODEL, differences
from sorsa_ds.config.schema import RunConfig, TrainConfig
from sorsa_ds.model.adapter_file import INITIAL
from sorsa_ds.run.checkpoint import folder, manifest
from sorsa_ds.run.checkpoint.manifest import Manifest
from sorsa_ds.run.checkpoint.saved import SavedTensors
from sorsa_ds.run.paths import ADAPTER, CHECKPOINTS, CONFIG, REPORT, run_of
from sorsa_ds.runtime import collectives, digest
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.folder_lock import is_held

AUTO = "auto"


@dataclass
class Resume:
    """Where a run is continued. `run`: its folder. `checkpoint`: whole, as `manifest` describes it."""

    run: Path
    checkpoint: Path
    manifest: Manifest

    @cached_property
    def tensors(self) -> SavedTensors:
        """The saved tensors, for the factors first and then for the optimizer.

        Raises:
            ValueError: a file is missing or damaged.
        """
        return SavedTensors([self.checkpoint / name for name in sorted(self.manifest.files)])

    def check(self, config: RunConfig) -> None:
        """Stop where settings differ that must not change.

        Raises:
            ValueError: naming all of them, with both values.
        """
        if changed := differences(config, self.manifest.config):
            listing = "; ".join(f"{name} was {then!r} and is now {now!r}" for name, (then, now) in changed.items())
            raise ValueError(f"--resume: the run was started with other settings: {listing}")

    def check_data(self, data: str) -> None:
        """Stop where the examples are not those that the run has learned from.

        Raises:
            ValueError: their digest differs.
        """
        if data != self.manifest.data:
            raise ValueError("--resume: the training examples are not those with which the run was started")

    def regroup(self, train: TrainConfig, world_size: int) -> TrainConfig:
        """The batch settings with the saved global batch, micro-batches regrouped where the ranks ask for it.

        Raises:
            ValueError: the saved global batch does not divide among the ranks.
        """
        size = self.manifest.config["train"]["global_batch_size"]
        micro, accumulation = train.micro_batch_size, train.gradient_accumulation_steps
        if micro and accumulation and micro * accumulation * world_size == size:
            return train
        if size % world_size:
            fitting = [n for n in range(1, size + 1) if size % n == 0]
            raise ValueError(
                f"--resume: the run's global batch of {size} examples does not divide among {world_size} ranks; take "
                f"{', '.join(map(str, fitting))} of them"
            )
        share, wanted = size // world_size, micro or self.manifest.config["train"]["micro_batch_size"]
        micro = next(m for m in range(min(wanted, share), 0, -1) if share % m == 0)
        return replace(train, global_batch_size=size, micro_batch_size=micro, gradient_accumulation_steps=None)


def find(request: str, config: RunConfig, device: torch.device) -> Resume | None:
    """The checkpoint that --resume asks for. A collective call.

    Args:
        request: `auto`, the folder of a run, or one of its checkpoints.

    Returns:
        None where `auto` finds no run that could be continued: a new one begins.

    Raises:
        ValueError: there is no such run or checkpoint, all checkpoints are damaged, the run still trains or is
            finished, or (unless `auto` may choose another run) the settings differ; on every rank.
    """
    plan = collectives.together(lambda: [_candidates(request, config)], device, on=0)
    [candidates] = collectives.gather_lists(plan or [])
    broken = []
    for path in candidates:
        found, wrong = _examined(path)
        if found is not None:
            for fault in broken:
                note(f"{fault}; passed over")
            resume = Resume(run_of(path), path, found)
            resume.check(config)
            return resume
        broken += wrong
    if not candidates:
        return None
    others = [path for path in folder.existing(run_of(candidates[0])) if path not in candidates]
    offered = next((str(path) for path in others if _examined(path)[0] is not None), None)
    way = f"--resume {offered} is whole" if offered else "no other checkpoint of this run is whole"
    raise ValueError("--resume: " + "; ".join(broken) + f"; {way}")


def named(request: str) -> Path:
    """The folder that --resume names.

    Raises:
        ValueError: there is none, or it is neither a run's nor a checkpoint's.
    """
    path = Path(request).expanduser().absolute()
    run = run_of(path)
    if not path.is_dir():
        near = folder.existing(run)
        hint = f"; the run's newest is {near[0]}" if near else ""
        raise ValueError(f"--resume: there is no folder {path}{hint}")
    if path == run and not (run / CONFIG).exists():
        raise ValueError(f"--resume: {run} is not the folder of a run: it has no {CONFIG}")
    return path


def _candidates(request: str, config: RunConfig) -> list[Path]:
    """Checkpoints to try, the best first; empty: begin anew. On rank 0."""
    if request == AUTO:
        output = config.output
        base = Path(output.folder).expanduser().absolute()
        runs = [base / output.name] if output.name else _runs_in(base, config)
        for run in runs:
            if (run / REPORT).exists():
                raise ValueError(f"--resume: {run} is finished")
            _check_free(run)
            if found := _whole_run(run):
                return found
        return []
    path = named(request)
    run = run_of(path)
    if path != run:
        _check_free(run)
        return [path]
    if (run / REPORT).exists():
        raise ValueError(f"--resume: {run} is finished; name one of its checkpoints to go on from there once more")
    _check_free(run)
    found = _whole_run(run)
    if not found:
        raise ValueError(
            f"--resume: {run} has no checkpoint; start it anew (output.save_every says how often it saves)"
        )
    return found


def _check_free(run: Path) -> None:
    if is_held(run):
        raise ValueError(f"--resume: {run} still trains; end that process first")


def _whole_run(run: Path) -> list[Path]:
    dangling = folder.dangling_latest(run)
    if dangling is not None:
        note(f"{run / CHECKPOINTS / folder.LATEST} names {dangling!r}, which is not there; passed over")
    return folder.existing(run)


def _runs_in(base: Path, config: RunConfig) -> list[Path]:
    """Unfinished runs with these settings that nothing works on, newest first."""
    found = []
    for run in base.iterdir() if base.is_dir() else []:
        if (run / CONFIG).exists() and not (run / REPORT).exists() and not is_held(run):
            try:
                saved = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                continue
            if isinstance(saved, dict) and not differences(config, saved, FREE_OF_ONE_MODEL):
                found.append(run)
    return sorted(found, key=lambda run: (run / CONFIG).stat().st_mtime, reverse=True)


def _examined(path: Path) -> tuple[Manifest | None, list[str]]:
    """A checkpoint's manifest if it is whole, else what is wrong. A collective call; each rank reads its share."""
    try:
        found = manifest.read(path)
    except ValueError as error:
        found, wrong = None, [str(error)]
    else:
        wrong = manifest.faults(path, found, collectives.rank(), collectives.world_size())
        initial = run_of(path) / ADAPTER / INITIAL
        if collectives.rank() == 0 and (digest.of_file(initial) if initial.exists() else "") != found.initial_factors:
            wrong.append(f"{initial} is missing or damaged")
    wrong = list(dict.fromkeys(collectives.gather_lists(wrong)))
    return (None if wrong else found), wrong
