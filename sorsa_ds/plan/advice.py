"""The nearest settings that fit: each change is tried by planning with it, alone first, then with those before it."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sorsa_ds.plan.facts import facts
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory

MOST_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Change:
    """A way to need less. settings: as they would be written on a command line."""

    settings: str
    job: Job


def advice(folder: Path, job: Job, limit: int) -> list[tuple[str, int]]:
    """Settings with which the job fits into `limit` bytes a GPU, and the bytes that it takes then.

    Returns:
        every single change that suffices; if none does, the smallest heap of changes that does; else more GPUs.
    """
    singles = []
    for change in _changes(job):
        if (needed := memory(change.job, facts(folder, change.job)).total) <= limit:
            singles.append((change.settings, needed))
    if singles:
        return singles
    heap: list[str] = []
    for step in _STEPS:
        if (change := step(job)) is not None:
            heap.append(change.settings)
            job = change.job
            if (needed := memory(job, facts(folder, job)).total) <= limit:
                return [(" ".join(heap), needed)]
    return _more_gpus(folder, job, limit, heap)


def _more_gpus(folder: Path, job: Job, limit: int, heap: list[str]) -> list[tuple[str, int]]:
    while job.ranks * 2 <= MOST_GPUS:
        hardware = job.hardware
        hardware = replace(hardware, gpus=2 * hardware.gpus) if hardware.gpus < 8 else replace(
            hardware, nodes=2 * hardware.nodes
        )  # fmt: skip
        try:
            job = Job.of(job.config, {**job.given, "train_batch_size": "auto"}, hardware)
        except ValueError:  # the batch cannot be divided so often
            return []
        if (needed := memory(job, facts(folder, job)).total) <= limit:
            return [(" ".join([*heap, f"--gpus {hardware.gpus} --nodes {hardware.nodes}"]), needed)]
    return []


def _changes(job: Job) -> Iterator[Change]:
    yield from (change for step in _STEPS if (change := step(job)) is not None)


def _checkpointing(job: Job) -> Change | None:
    if job.config.train.gradient_checkpointing:
        return None
    return _with(job, "train.gradient_checkpointing=true", gradient_checkpointing=True)


def _smaller_micro_batch(job: Job) -> Change | None:
    sizes = job.resolved
    if sizes.micro_batch_size == 1:
        return None
    accumulation = sizes.gradient_accumulation_steps * sizes.micro_batch_size
    return _with(
        job, f"train.micro_batch_size=1 train.gradient_accumulation_steps={accumulation}",
        micro_batch_size=1, gradient_accumulation_steps=accumulation,
    )  # fmt: skip


def _zero3(job: Job) -> Change | None:
    if job.stage == 3 or job.ranks == 1:
        return None
    return _with_zero(job, "--ds_config ds_configs/zero3.json", {"stage": 3, "reduce_bucket_size": 10**8})


def _over_all_ranks(job: Job) -> Change | None:
    if job.stage < 3 or job.frozen_blocks == job.ranks:
        return None
    given = copy.deepcopy(job.given)
    del given["zero_optimization"]["zero_hpz_partition_size"]
    return _planned(job, "(no zero_hpz_partition_size in the DeepSpeed JSON)", job.config, given)


def _packed(storage: str) -> Callable[[Job], Change | None]:
    def pack(job: Job) -> Change | None:
        if job.storage.quantised:
            return None
        return _planned(job, f"residual.storage={storage}", replace(
            job.config, residual=replace(job.config.residual, storage=storage)
        ))  # fmt: skip

    return pack


def _offload(job: Job) -> Change | None:
    if job.offloaded("optimizer"):
        return None
    section = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return _with_zero(job, "--ds_config ds_configs/zero3_offload.json", section)


_STEPS: tuple[Callable[[Job], Change | None], ...] = (
    _checkpointing, _smaller_micro_batch, _zero3, _over_all_ranks, _packed("nf4"), _packed("nf4_double"), _offload,
)  # fmt: skip
"""Cheapest first: what costs time before what costs precision, and the host's memory last."""


def _with(job: Job, settings: str, **train) -> Change | None:
    return _planned(job, settings, replace(job.config, train=replace(job.config.train, **train)))


def _with_zero(job: Job, settings: str, section: dict) -> Change | None:
    given = copy.deepcopy(job.given)
    given["zero_optimization"] = {**given.get("zero_optimization", {}), **section}
    return _planned(job, settings, job.config, given)


def _planned(job: Job, settings: str, config, given: dict | None = None) -> Change | None:
    """The job with other settings; None where they do not go with the rest."""
    given = copy.deepcopy(job.given if given is None else given)
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given |= {key: "auto" for key in sizes if key in given and config.train != job.config.train}
    try:
        return Change(settings, Job.of(config, given, job.hardware))
    except ValueError:
        return None
