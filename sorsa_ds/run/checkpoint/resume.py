"""`--resume`: which checkpoint a run goes on from, and whether it is whole."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sorsa_ds.config.differences import FREE_OF_ONE_MODEL, LENGTH, differences
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import INITIAL
from sorsa_ds.run.best import BestSoFar
from sorsa_ds.run.checkpoint.folder import LATEST, dangling_latest
from sorsa_ds.run.checkpoint.manifest import Manifest, digest_of_initial, file_faults, read_manifest
from sorsa_ds.run.checkpoint.named import check_not_running, named_checkpoints
from sorsa_ds.run.checkpoint.saved import SavedTensors
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.metrics import is_evaluated_again, is_kept, read_metrics
from sorsa_ds.run.paths import ADAPTER, AUTO, CHECKPOINTS, CONFIG, run_of
from sorsa_ds.run.ways_on import under_another_name
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note


@dataclass(frozen=True, kw_only=True)
class WholeCheckpoint:
    """A checkpoint whose files have been found undamaged.

    path: its folder. manifest: its description.
    """

    path: Path
    manifest: Manifest

    @property
    def run(self) -> Path:
        """The folder of the run that has saved it."""
        return run_of(self.path)

    @cached_property
    def tensors(self) -> SavedTensors:
        """The saved tensors, for the factors first and then for the optimizer.

        Raises:
            ValueError: a file is missing or damaged.
        """
        return SavedTensors([self.path / name for name in sorted(self.manifest.files)])

    def account(self, config: RunConfig, last: int | None = None) -> BestSoFar:
        """What the run's evaluations until the checkpoint have shown, by the checkpoint and by metrics.jsonl.

        Args:
            last: the run's last step as it goes on, to leave out an evaluation that is made again then; None: with it.

        Raises:
            ValueError: metrics.jsonl is damaged.
        """
        step, every = self.manifest.progress.step, config.train.eval_every
        again = last is not None and is_evaluated_again(step, every, last)
        lines = [line for line in read_metrics(self.run) if is_kept(line, step, again)]
        return self.manifest.progress.best.after_all(lines, config.evaluation.min_delta)

    def check_settings(self, config: RunConfig) -> None:
        """Stop where settings differ that must not change while a run goes on.

        How long the run is may change, unless its method plans for all steps; see `check_length`.

        Raises:
            ValueError: naming all of them, with both values.
        """
        changed = differences(config, self.manifest.config)
        if not method_of(config).plans_all_steps:
            changed = {name: values for name, values in changed.items() if name not in LENGTH}
        if changed:
            listing = "; ".join(f"{name} was {then!r} and is now {now!r}" for name, (then, now) in changed.items())
            raise ValueError(f"--resume: the run was started with other settings: {listing}")

    def check_length(self, config: RunConfig, steps: int) -> str | None:
        """What must be known of a run that goes on to another last step than was planned, in a sentence.

        Args:
            steps: the number of steps of the whole run, by the settings as they are now.

        Returns:
            None where nothing was changed.

        Raises:
            ValueError: the checkpoint is behind the new end, or `evaluation.patience` ends the run where it is.
        """
        changed = {k: v for k, v in differences(config, self.manifest.config).items() if k in LENGTH}
        done = self.manifest.progress.step
        if not changed:
            return None
        told = ", ".join(f"{name} was {then} and is now {now}" for name, (then, now) in changed.items())
        if steps <= done:
            raise ValueError(f"--resume: {told}: that is {steps} steps, and {self.path} was saved after step {done}")
        watched = config.evaluation
        account = self.account(config)
        if account.has_waited(watched.patience):
            raise ValueError(
                f"--resume: {told}, but the run stopped early after step {account.seen}: its held-out loss has not "
                f"fallen in {account.waited} evaluations (evaluation.patience={watched.patience}); to go on, set "
                f"evaluation.patience to more than {account.waited}, or to 0"
            )
        return (
            f"The run now goes on to step {steps} ({told}): from step {done + 1} on the learning rate is that of a run "
            f"of so many steps."
        )


def find_checkpoint(request: str, config: RunConfig, device: torch.device) -> WholeCheckpoint | None:
    """The checkpoint that --resume asks for. A collective call.

    Args:
        request: `auto`, the folder of a run, or one of its checkpoints.

    Returns:
        None where `auto` finds no run that could be continued: a new one begins.

    Raises:
        ValueError: there is no such run or checkpoint, all checkpoints are damaged, the run still trains or is
            finished, or (unless `auto` may choose another run) the settings differ; on every rank.
    """
    found_by_rank_0 = collectives.together(lambda: _candidates(request, config), device, on=0)
    candidates = [Path(path) for path in collectives.gather_lists([str(path) for path in found_by_rank_0 or []])]
    damaged: list[str] = []
    for path in candidates:
        found, faults = _examined(path)
        if found is not None:
            for fault in damaged:
                note(f"{fault}; passed over")
            found.check_settings(config)
            return found
        damaged += faults
    if not candidates:
        return None
    others = [path for path in RunState(run_of(candidates[0])).checkpoints if path not in candidates]
    offered = next((str(path) for path in others if _examined(path)[0] is not None), None)
    way = f"--resume {offered} is whole" if offered else "no other checkpoint of this run is whole"
    raise ValueError("--resume: " + "; ".join(damaged) + f"; {way}")


def _candidates(request: str, config: RunConfig) -> list[Path]:
    """Checkpoints to try, the best first; an empty list stands for a new run. Rank 0 alone looks."""
    if request == AUTO:
        return _automatic_candidates(config)
    found = named_checkpoints(request, config)
    _note_dangling(run_of(found[0]))
    return found


def _automatic_candidates(config: RunConfig) -> list[Path]:
    """The checkpoints of the run with this name, or of the newest unfinished run with these settings."""
    base = Path(config.output.folder).expanduser().absolute()
    runs = [RunState(base / config.output.name)] if config.output.name else _unfinished_runs(base, config)
    for run in runs:
        if run.is_finished:
            raise ValueError(f"--resume: {run.folder} is finished; to train another: {under_another_name(run.folder)}")
        check_not_running(run)
        _note_dangling(run.folder)
        if found := run.checkpoints:
            return found
    return []


def _note_dangling(run: Path) -> None:
    """Warn if the file `latest` names no checkpoint that is there."""
    dangling = dangling_latest(run)
    if dangling is not None:
        note(f"{run / CHECKPOINTS / LATEST} names {dangling!r}, which is not there; passed over")


def _unfinished_runs(base: Path, config: RunConfig) -> list[RunState]:
    """Unfinished runs with these settings on which no process works, newest first."""
    found = []
    for run in map(RunState, base.iterdir() if base.is_dir() else []):
        if run.is_run and not run.is_finished and not run.is_running:
            try:
                saved = run.saved_settings()
            except (OSError, ValueError):
                continue
            if not differences(config, saved, FREE_OF_ONE_MODEL):
                found.append(run)
    return sorted(found, key=lambda run: (run.folder / CONFIG).stat().st_mtime, reverse=True)


def _examined(path: Path) -> tuple[WholeCheckpoint | None, list[str]]:
    """A checkpoint if it is whole, else what is wrong with it. A collective call: each rank reads its share of it."""
    manifest, faults = None, []
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        faults = [str(error)]
    if manifest is not None:
        faults = file_faults(path, manifest, collectives.rank(), collectives.world_size())
        if collectives.rank() == 0 and digest_of_initial(run_of(path)) != manifest.initial_factors:
            faults.append(f"{run_of(path) / ADAPTER / INITIAL} is missing or damaged")
    faults = list(dict.fromkeys(collectives.gather_lists(faults)))
    whole = None if manifest is None or faults else WholeCheckpoint(path=path, manifest=manifest)
    return whole, faults
