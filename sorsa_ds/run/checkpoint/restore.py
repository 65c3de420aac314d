"""Going on from a checkpoint: the state of optimizer, schedule and random numbers, and then what lies in the folder."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.run.best import BestSoFar
from sorsa_ds.run.checkpoint import eight_bit, folder, fragments, random_state
from sorsa_ds.run.checkpoint.manifest import RunProgress
from sorsa_ds.run.checkpoint.resume import WholeCheckpoint
from sorsa_ds.run.checkpoint.saved import read_own
from sorsa_ds.run.paths import ADAPTER, PAGE, PICTURE, REPORT, run_of
from sorsa_ds.run.peft_files.files import remove_peft_files
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note, say


def restore_training(checkpoint: WholeCheckpoint, engine: SorsaEngine, config: RunConfig, steps: int) -> RunProgress:
    """Bring an engine, whose weights are the checkpoint's already, to the state in which the checkpoint was saved.

    A collective call. The run's folder stays as it is until `go_back`.

    Args:
        config: the settings with which the run goes on; where the number of ranks has changed, random states follow
            from `train.seed`.
        steps: the number of steps of the whole run.

    Returns:
        How far the run is. Evaluations after the checkpoint was saved that are not made again are counted.

    Raises:
        ValueError: the checkpoint lacks something, or a file of the run is damaged; on every rank.
    """
    saved = checkpoint.manifest
    step = saved.progress.step
    if eight_bit.is_used(engine):
        eight_bit.restore(engine, checkpoint.path, step)
    elif engine.moments_like_masters:
        fragments.restore_moments(engine, checkpoint.tensors, step)
    engine.restore_method_state(fragments.method_state(checkpoint.path))
    engine.continue_after(step, saved.scheduler)
    if saved.world_size == collectives.world_size():
        random_state.put_back(read_own(folder.rank_file(checkpoint.path, collectives.rank()), random_state.PREFIX))
    else:
        # Dropout cannot repeat what other ranks would have drawn; it must not repeat the first steps either.
        torch.manual_seed(hash((config.train.seed, step, collectives.rank())))
    found = collectives.on_rank_0(lambda: asdict(checkpoint.account(config, steps)), engine.device)
    return replace(saved.progress, best=BestSoFar(**found))


def go_back(checkpoint: Path | None, progress: RunProgress, device: torch.device) -> None:
    """Bring a run's folder to where the run goes on: it is unfinished from now on. A collective call.

    Args:
        checkpoint: the checkpoint that the run goes on from; None: a new run, whose folder stays as it is.
        progress: how far the run is.

    Raises:
        ValueError, OSError: the run's folder cannot be written; PeerError on the other ranks then.
    """
    if checkpoint is None:
        return
    run = run_of(checkpoint)
    collectives.together(lambda: _go_back_to(run, progress.step, progress.best.step), device, on=0)
    say(f"Going on after step {progress.step}, from {checkpoint}.")


def _go_back_to(run: Path, step: int, best: int) -> None:
    """Remove what an earlier end of a run has made, and set aside its checkpoints that are later than `step`.

    The report goes first: without it nobody takes the rest for that of a finished run, wherever this is cut off. The
    trained factors stay, as the run's own account of its earlier end.

    Args:
        best: the step of the lowest held-out loss until then, whose checkpoint is the best one again if it is there.
    """
    (run / REPORT).unlink(missing_ok=True)
    remove_peft_files(run / ADAPTER)
    for name in (PAGE, PICTURE):
        (run / name).unlink(missing_ok=True)
    for path in folder.set_aside_after(run, step):
        note(f"a later checkpoint is set aside: {path}")
    folder.name_best(run, best)
