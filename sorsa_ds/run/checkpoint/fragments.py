"""One rank's part of the training state: from the engine into memory, and the optimizer's share of it back.

A tensor is named `<part>/<parameter>@<start>`: it is the flat range, from `start` on, of a parameter's values or of one
of its moments. 8-bit moments are stored as they are (`sorsa_ds.run.checkpoint.eight_bit`). What a method needs beside
them is named `method/<name>`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.engine.masters import Fragment, inner_optimizer
from sorsa_ds.run.checkpoint import eight_bit
from sorsa_ds.run.checkpoint.folder import rank_file
from sorsa_ds.run.checkpoint.host_copies import HostCopies
from sorsa_ds.run.checkpoint.saved import SavedTensors, read_own
from sorsa_ds.runtime import collectives

VALUES, MOMENTS, METHOD = "values", ("exp_avg", "exp_avg_sq"), "method/"


def own_fragments(engine: SorsaEngine) -> list[Fragment]:
    """The fragments that this rank writes: its own, or its turn of those that all ranks hold alike."""
    masters = engine.masters
    return masters.fragments if masters.sharded else masters.fragments[collectives.rank() :: collectives.world_size()]


def snapshot(engine: SorsaEngine, host: HostCopies) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Copies in host memory of everything that this rank has to write, and a function that waits until they are there.

    They take 12 bytes per trained number, or 6 with 8-bit moments. Those of the time before must not be needed any
    more.
    """
    state = inner_optimizer(engine).state
    like_masters = engine.moments_like_masters and not eight_bit.is_used(engine)
    now = {}
    for fragment in own_fragments(engine):
        place = f"{fragment.name}@{fragment.start}"
        now[f"{VALUES}/{place}"] = fragment.values()
        for moment in MOMENTS if like_masters else ():
            held = state.get(fragment.master, {}).get(moment)
            # Before the first step some stages have no moments: they are zero.
            now[f"{moment}/{place}"] = torch.zeros(fragment.numel) if held is None else fragment.within(held)
    if eight_bit.is_used(engine):
        now |= eight_bit.held(engine)
    copies, wait = host.take(now)
    if collectives.rank() == 0:
        copies |= {
            METHOD + name: tensor.detach().to("cpu", copy=True) for name, tensor in engine.method_state().items()
        }
    return copies, wait


def method_state(checkpoint: Path) -> dict[str, Tensor]:
    """What the engine's method had beside values and moments; every rank reads rank 0's."""
    found = read_own(rank_file(checkpoint, 0), METHOD)
    return {name.removeprefix(METHOD): tensor for name, tensor in found.items()}


@torch.no_grad()
def restore_moments(engine: SorsaEngine, saved: SavedTensors, steps_done: int) -> None:
    """Give the optimizer the moments of a checkpoint, made at any number of ranks and on any ZeRO stage.

    Raises:
        ValueError: the checkpoint lacks a part of them.
    """
    state = inner_optimizer(engine).state
    for master in {id(f.master): f.master for f in engine.masters.fragments}.values():
        held = state[master]
        if not held:
            held["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            held.update({moment: torch.zeros_like(master) for moment in MOMENTS})
        held["step"].fill_(steps_done)
    for fragment in engine.masters.fragments:
        for moment in MOMENTS:
            values = saved.read(moment, fragment.name, fragment.start, fragment.numel)
            fragment.within(state[fragment.master][moment]).copy_(values)
