"""Bytes of the host's memory that offloading takes on one rank, by what they are for.

PyTorch rounds each page-locked block up to a power of two and keeps a freed one for later (CachingHostAllocator.h), so
the sizes of blocks count, not only their sum. Which blocks DeepSpeed 0.19.8 makes was read off its calls; tests hold
the plan to them.

Letters: T trained numbers, N ranks, f bytes of a trained number as the model holds it (4, or 2 in a bf16 engine).
"""

from collections import Counter
from collections.abc import Iterable

from sorsa_ds.config.deepspeed_sections import said
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.model_facts import Facts, Held

FP32 = 4


def taken(nbytes: int, pinned: bool) -> int:
    """Bytes that a block takes of the host's memory: page-locked ones are rounded up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if pinned and nbytes else nbytes


def offloaded_parameters(job: Job, held: Iterable[tuple[Held, int]]) -> Counter[str]:
    """Bytes of offloaded parameters, by kind.

    Args:
        held: every parameter, with the bytes of this rank's block of it.

    DeepSpeed moves the blocks of what is trained into one flat block. The blocks that they leave stay with PyTorch
    where they are page-locked.
    """
    pinned, found, flat = job.pinned("param"), Counter[str](), 0
    for parameter, nbytes in held:
        trained = parameter.kind == "trained"
        flat += nbytes if trained else 0
        found[parameter.kind] += taken(nbytes, pinned) if pinned or not trained else 0
    found["trained"] += taken(flat, pinned)
    return found


def offloaded_gradients(job: Job, facts: Facts, mine: int) -> int:
    """Bytes of what an offloaded optimizer holds beside masters and moments.

    Args:
        mine: the trained numbers that the rank's optimizer updates.
    """
    pinned, f = job.pinned("optimizer"), job.precision.factor_dtype.itemsize
    if job.stage == 3:
        size = int(said(job.zero, "sub_group_size") or 10**9)
        groups, rest = divmod(mine, size)
        own = groups * taken(FP32 * size, pinned) + taken(FP32 * rest, pinned)  # the masters' .grad
        return own + taken(FP32 * mine, pinned)  # and what is accumulated, in one block
    trained = [p for p in facts.parameters if p.kind == "trained"]
    largest = max(p.numel for p in trained)
    # The masters' .grad, what was updated, and a gradient on its way.
    own = taken(FP32 * mine, pinned) + taken(f * mine, pinned) + taken(f * largest, pinned)
    if job.stage == 2 and job.precision.name != "bf16" and job.resolved.gradient_accumulation_steps > 1:
        own += _accumulated(job, trained, mine)
    return own


def _accumulated(job: Job, trained: list[Held], mine: int) -> int:
    """Bytes of the gradients that ZeRO-2 accumulates, each parameter's whole in a block of its own.

    A rank has those of which some numbers are its own; counted for the rank that has most.
    """
    pinned, start, of_a_rank = job.pinned("optimizer"), 0, Counter[int]()
    for parameter in trained:
        last = start + parameter.numel - 1
        for rank in range(start // mine, last // mine + 1):
            of_a_rank[rank] += taken(parameter.numel * parameter.itemsize, pinned)
        start = last + 1
    return max(of_a_rank.values())
