"""The plan at the beginning of a run: said in a line, and what cannot fit is refused before anything is loaded."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from sorsa_ds.config.deepspeed_json import Resolved
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.plan import beside_tensors
from sorsa_ds.plan.advice import advice
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import HEADROOM, Place, places
from sorsa_ds.plan.micro_batch import NoEstimateError, Sized, size_micro_batch
from sorsa_ds.plan.report import short
from sorsa_ds.runtime import collectives, process
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.device import device_type, gpu_memory, this_device
from sorsa_ds.runtime.memory import GIB, free_memory
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import Storage


@dataclass(frozen=True, slots=True, order=True)
class Free:
    """Bytes that a rank may take. Of several ranks the one with the smallest GPU memory compares as the least.

    gpu: free bytes of the rank's GPU, with what the rank holds already; 0 without a GPU.
    gpu_total: all bytes of the rank's GPU; 0 without a GPU.
    host: the rank's share of the free bytes of its node.
    """

    gpu: int
    gpu_total: int
    host: int
    rank: int
    node: str


def fit_memory(
    folder: Path,
    config: RunConfig,
    given: dict,
    resolved: Resolved,
    formats: Precision,
    storage: Storage,
    check: Callable[[PreTrainedModel], object] | None = None,
) -> Resolved:
    """Resolve the micro-batch where it is open, say what a run needs, and stop where this machine has less.

    Rank 0 plans for all, with the least memory that any of them has. With train.check_memory=false nothing is refused.
    A collective call.

    Args:
        folder: the model's folder.
        config: the settings, with what was left open filled in, but for the micro-batch.
        given: the DeepSpeed JSON as the user wrote it, and `resolved` as it was resolved for this job.
        check: is given the model without memory before its layers are replaced, and raises a ValueError where it cannot
            be trained; None: nothing is checked.

    Returns:
        `resolved`, with the micro-batch.

    Raises:
        ValueError: the run cannot fit, the model has no such targets or ranks, or `check` has raised it; on every rank.
    """
    if not (config.train.check_memory or resolved.micro_choices):
        return resolved
    job, others = _on_this_machine(Job(config, given, resolved, formats, storage, Hardware()))

    def plan_for_all() -> tuple[int, str | None, str, str | None]:
        """The micro-batch, a sentence on its choice, what is needed, and why that cannot be had."""
        try:
            sized = size_micro_batch(folder, job, check)
        except NoEstimateError as error:
            size = resolved.micro_choices[0] if resolved.micro_choices else resolved.micro_batch_size
            unknown = f"The memory that this run needs cannot be estimated ({error}); micro-batch {size}."
            return size, unknown, "", None
        found = places(sized.job, sized.memory)
        full = next((place for place in found if place.needed > place.limit), None)
        refusal = None if full is None else _refusal(full, others, _ways_to_fit(folder, sized))
        return sized.job.resolved.micro_batch_size, sized.choice, short(sized.memory, found) + others, refusal

    micro_batch, choice, needed, refusal = collectives.on_rank_0(plan_for_all, this_device())
    if choice is not None:
        say(choice)
    if config.train.check_memory:
        if needed:
            say(needed)
        if refusal is not None:
            raise ValueError(refusal)
    return resolved.with_micro_batch(micro_batch) if resolved.micro_choices else resolved


def _on_this_machine(job: Job) -> tuple[Job, str]:
    """The job on the hardware that it runs on, and a sentence on a GPU of which other processes hold much.

    A collective call.
    """
    gpu = gpu_memory() if device_type() == "cuda" else None
    mine = Free(
        gpu=0 if gpu is None else min(gpu.total, gpu.free + gpu.held + beside_tensors.at_the_start(job)),
        gpu_total=0 if gpu is None else gpu.total,
        host=free_memory() // process.local_ranks(),
        rank=collectives.rank(),
        node=os.uname().nodename,
    )
    found = [Free(**one) for one in collectives.gather_json(asdict(mine))]
    least, ranks = min(found), process.ranks_of_each_node() or len(found)
    hardware = Hardware(
        gpus=ranks,
        nodes=len(found) // ranks,
        gpu_memory=least.gpu,
        host_memory=min(free.host for free in found) * ranks,
        device=device_type(),
    )
    taken = least.gpu_total - least.gpu
    others = (
        f" Other processes hold about {taken / GIB:.2f} of the {least.gpu_total / GIB:.2f} GiB of the GPU of rank "
        f"{least.rank} on {least.node}."
    )
    return replace(job, hardware=hardware), others if taken > HEADROOM * least.gpu_total else ""


def _ways_to_fit(folder: Path, sized: Sized) -> list[str]:
    """Settings with which a job fits into these GPUs, the cheapest first; none where the ranks compute on CPUs."""
    if sized.job.hardware.device == "cpu":
        return []
    ways = advice(folder, sized.job, more_gpus=False, known=sized.facts)
    return [f"{way.settings} ({way.gpu / GIB:.2f} GiB)" for way in ways]


def _refusal(place: Place, others: str, ways: list[str]) -> str:
    """Why a run is not started, and what can be done.

    Args:
        others: a sentence on other processes; empty where there is nothing to say.
        ways: settings with which it fits.
    """
    lines = [
        f"the run needs about {place.needed / GIB:.2f} GiB per rank, more than the {place.limit / GIB:.2f} GiB "
        f"{place.where} that it may take here.{others}"
    ]
    if ways:
        lines += ["It would fit with:", *(f"  {way}" for way in ways)]
    lines.append(
        "launch/plan.py with the same settings tells what would fit elsewhere; train.check_memory=false skips this "
        "check"
    )
    return "\n".join(lines)
