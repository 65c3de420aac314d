"""The 8-bit state of bitsandbytes' AdamW in a checkpoint: as it is, bit for bit.

Each 256 numbers of a master have one scale, so the codes belong to the way in which ZeRO has cut the masters. A run
goes on from them only where the masters are cut in the same way; the layout is stored beside them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.engine.masters import inner_optimizer
from sorsa_ds.run.checkpoint.folder import rank_file
from sorsa_ds.run.checkpoint.saved import read_own
from sorsa_ds.runtime import collectives

PREFIX = "optimizer/"
_LAYOUT, _STATE = f"{PREFIX}layout", ("state1", "state2", "absmax1", "absmax2")


def is_used(engine: SorsaEngine) -> bool:
    """Whether the engine's optimizer is bitsandbytes', which calls its own way of making state `init_state`."""
    return hasattr(inner_optimizer(engine), "init_state")


def held(engine: SorsaEngine) -> dict[str, Tensor]:
    """What this rank has to write: the state of its masters; without ZeRO rank 0's, which all ranks have alike."""
    if not engine.masters.sharded and collectives.rank() > 0:
        return {}
    state, found = inner_optimizer(engine).state, {_LAYOUT: _layout(engine)}
    for number, master in enumerate(_masters(engine)):
        for name in _STATE:
            if name in state.get(master, {}):
                found[f"{PREFIX}{number}/{name}"] = state[master][name]
    return found


def restore(engine: SorsaEngine, checkpoint: Path, steps_done: int) -> None:
    """Give the optimizer the state of a checkpoint. A collective call.

    Raises:
        ValueError: the masters are cut in another way than when it was saved, or it lacks something.
    """
    collectives.together(lambda: _restore(engine, checkpoint, steps_done), engine.device)


def _restore(engine: SorsaEngine, checkpoint: Path, steps_done: int) -> None:
    path = rank_file(checkpoint, collectives.rank() if engine.masters.sharded else 0)
    saved = read_own(path, PREFIX) if path.exists() else {}
    if _LAYOUT not in saved or not torch.equal(saved.pop(_LAYOUT), _layout(engine)):
        raise ValueError(
            f"{checkpoint}: train.optimizer=adamw_8bit can only go on with the number of ranks, the ZeRO stage and the "
            "sub-groups with which the checkpoint was made, because ZeRO cuts the 8-bit state in another way otherwise"
        )
    optimizer: Any = inner_optimizer(engine)
    for number, master in enumerate(_masters(engine)):
        if not any(key.startswith(f"{PREFIX}{number}/") for key in saved):
            continue  # saved before the first step, on a stage that makes the state there
        if not optimizer.state[master]:
            _make_state(optimizer, master)
        state = optimizer.state[master]
        state["step"] = steps_done
        for name in _STATE:
            if name in state:
                key = f"{PREFIX}{number}/{name}"
                if key not in saved or saved[key].shape != state[name].shape:
                    raise ValueError(f"{path}: {key} is missing, or of another shape")
                state[name].copy_(saved[key])


def _make_state(optimizer: Any, master: Tensor) -> None:
    """Let bitsandbytes make the state of a master, as its first step would. ZeRO-3 shows the masters at a step only."""
    group = optimizer.param_groups[0]
    shown, group["params"] = group["params"], [master]
    optimizer.init_state(group, master, 0, 0)
    group["params"] = shown


def _masters(engine: SorsaEngine) -> list[Tensor]:
    """The masters of this rank, in the order of its fragments."""
    return list({id(fragment.master): fragment.master for fragment in engine.masters.fragments}.values())


def _layout(engine: SorsaEngine) -> Tensor:
    """Which numbers lie where in which master, as the bytes of a JSON text."""
    numbers = {id(master): number for number, master in enumerate(_masters(engine))}
    places = [[f.name, f.start, f.numel, numbers[id(f.master)], f.offset] for f in engine.masters.fragments]
    return torch.tensor(list(json.dumps(places).encode()), dtype=torch.uint8)
