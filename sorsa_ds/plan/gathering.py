"""Which parameters ZeRO-3 gathers together, and how many bytes of them a rank then holds whole.

DeepSpeed 0.19.8 gathers what a module itself holds when it is called, and a leaf with everything inside it: mixtures of
experts are leaves, or nearly so, since their experts are called one right after the other. The parameters of a module
that has several arrive in one buffer, and are copied out of it. Its limits bind only what is fetched ahead and what is
kept for a later use; a block that is recomputed keeps all of its frozen parameters until its backward is through. Tests
hold this to the parameters that are there while engines train.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sorsa_ds.model.experts import Stack
from sorsa_ds.model.uneven_calls import calls_unevenly
from sorsa_ds.plan.job import Job


@dataclass(frozen=True, slots=True)
class Gathers:
    """Bytes of parameters that ZeRO-3 gathers together.

    largest: bytes of the largest module that is gathered at once.
    joined: bytes of the largest module that has several parameters; 0 where none has.
    block: bytes of the largest block; 0 without blocks.
    """

    largest: int
    joined: int
    block: int


def gathers(model: nn.Module, stacks: Sequence[Stack]) -> Gathers:
    """What ZeRO-3 would gather together of an adapted model without memory.

    Args:
        stacks: the experts that the model holds as one parameter, adapted or not.
    """
    leaves = {stack.module.rpartition(".")[0] for stack in stacks}
    leaves |= {name for name, module in model.named_modules() if calls_unevenly(module)}
    together: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        holder = name.rpartition(".")[0]
        leaf = next((leaf for leaf in leaves if holder == leaf or holder.startswith(f"{leaf}.")), holder)
        together.setdefault(leaf, []).append(parameter.nbytes)
    blocks = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return Gathers(
        max(map(sum, together.values())),
        max((sum(sizes) for sizes in together.values() if len(sizes) > 1), default=0),
        max((sum(parameter.nbytes for parameter in block.parameters()) for block in blocks), default=0),
    )


def held_whole(job: Job, found: Gathers, numbers: int, nbytes: int) -> int:
    """Bytes of cut parameters that a rank holds whole at most, with the buffer in which they arrive.

    Args:
        numbers: numbers in all parameters that are cut and are not always held whole, and `nbytes` their bytes.
    """
    if not numbers:
        return 0
    limit = max(job.zero["stage3_max_live_parameters"], job.zero["stage3_max_reuse_distance"])
    live = min(nbytes, limit * nbytes // numbers + found.largest)
    if job.config.train.gradient_checkpointing:
        live = min(nbytes, max(live, found.block))
    return live + found.joined
