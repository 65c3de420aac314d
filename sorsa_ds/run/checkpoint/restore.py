"""Putting the training state back from a checkpoint: optimizer, schedule and random states."""

from pathlib import Path

import torch

from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.run.checkpoint import eight_bit, folder, fragments, random_state
from sorsa_ds.run.checkpoint.resume import WholeCheckpoint
from sorsa_ds.run.checkpoint.saved import read_own
from sorsa_ds.run.paths import REPORT
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note, say


def restore_training(checkpoint: WholeCheckpoint, engine: SorsaEngine, seed: int) -> None:
    """Bring an engine, whose weights are the checkpoint's already, to the state in which the checkpoint was saved.

    A collective call.

    Args:
        seed: `train.seed`, from which random states follow where the number of ranks has changed.

    Raises:
        ValueError: the checkpoint lacks something, or the run's folder cannot be written; on every rank.
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
        torch.manual_seed(hash((seed, step, collectives.rank())))
    collectives.together(lambda: _go_back_to(checkpoint.run, step, saved.progress.best.step), engine.device, on=0)
    say(f"Going on after step {step}, from {checkpoint.path}.")


def _go_back_to(run: Path, step: int, best: int) -> None:
    """Delete the report of a run, and set aside its checkpoints that are later than `step`.

    Args:
        best: the step of the lowest held-out loss until then, whose checkpoint is the best one again if it is there.
    """
    (run / REPORT).unlink(missing_ok=True)  # a finished run may go on from an earlier checkpoint
    for path in folder.set_aside_after(run, step):
        note(f"a later checkpoint is set aside: {path}")
    folder.name_best(run, best)
