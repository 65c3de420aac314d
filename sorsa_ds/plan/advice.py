"""The nearest settings that fit: each change is planned alone first, then together with the changes before it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sorsa_ds.config import deepspeed_json
from sorsa_ds.config.train_settings import TrainConfig
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import fits, memory, of_a_node
from sorsa_ds.plan.model_facts import Facts, facts
from sorsa_ds.runtime.shipped import SHIPPED

MOST_GPUS, A_NODE = 1024, 8

LONG = 4096
"""Tokens of a sequence from which on it is worth while that several ranks share it."""


@dataclass(frozen=True, slots=True)
class Way:
    """Settings with which a job fits, as on a command line, and the bytes that it takes of a GPU and of a node."""

    settings: str
    gpu: int
    host: int


@dataclass(frozen=True, slots=True)
class Change:
    """A way to need less memory.

    settings: `--option` or path of a setting -> value, as text. job: the job with them.
    """

    settings: dict[str, str]
    job: Job


def advice(folder: Path, job: Job, more_gpus: bool = True, known: Facts | None = None) -> list[Way]:
    """Settings with which the job fits into its hardware.

    Args:
        more_gpus: whether there may be more GPUs than the job has.
        known: the facts of the job's own model, which takes seconds to build again.

    Returns:
        Every single change that suffices. If none does, the shortest row of changes that suffices together; if there
        is none, those changes on more GPUs.
    """
    trial = _Trial(folder, job, known)
    singles = [change for step in _STEPS if (change := step(job)) is not None]
    if ways := [way for change in singles if (way := trial.way(change)) is not None]:
        return ways
    heap = Change({}, job)
    for step in _STEPS:
        if (change := step(heap.job)) is not None:
            heap = Change(heap.settings | change.settings, change.job)
            if (way := trial.way(heap)) is not None:
                return [way]
    return _more_gpus(trial, heap) if more_gpus else []


class _Trial:
    """Plans the changes that are tried.

    Building a model takes seconds, so it is built once for all changes that only change how it is trained.
    """

    def __init__(self, folder: Path, job: Job, known: Facts | None):
        self._folder = folder
        self._models: list[tuple[tuple, Facts]] = [] if known is None else [(_settings_of_model(job), known)]

    def way(self, change: Change) -> Way | None:
        """The settings of a change with which the job fits; None if it does not."""
        try:
            needed = memory(change.job, self._facts(change.job))
        except ValueError:  # the model cannot be trained with these settings, as on shards of sequences
            return None
        if not fits(change.job, needed):
            return None
        words = (f"{key} {text}" if key.startswith("--") else f"{key}={text}" for key, text in change.settings.items())
        return Way(" ".join(words), needed.total, of_a_node(change.job, needed))

    def _facts(self, job: Job) -> Facts:
        settings = _settings_of_model(job)
        for known, model in self._models:
            if known == settings:
                return model
        self._models.append((settings, facts(self._folder, job)))
        return self._models[-1][1]


def _settings_of_model(job: Job) -> tuple:
    """All that the facts of a job's model depend on."""
    return replace(job.config, train=TrainConfig()), job.precision, job.storage, job.most_examples, job.together


def _more_gpus(trial: _Trial, heap: Change) -> list[Way]:
    for hardware in larger(heap.job.hardware):
        try:
            job = Job.of(heap.job.config, heap.job.given, hardware)
        except ValueError:  # the batch is not a multiple of so many ranks
            continue
        more = {"--gpus": str(hardware.gpus), "--nodes": str(hardware.nodes)}
        if (way := trial.way(Change(heap.settings | more, job))) is not None:
            return [way]
    return []


def larger(hardware: Hardware) -> Iterator[Hardware]:
    """Twice as many GPUs up to a whole node, then twice as many nodes, and so on."""
    while hardware.ranks * 2 <= MOST_GPUS:
        if hardware.gpus < A_NODE:
            hardware = replace(hardware, gpus=min(2 * hardware.gpus, A_NODE))
        else:
            hardware = replace(hardware, nodes=2 * hardware.nodes)
        yield hardware


def _checkpointing(job: Job) -> Change | None:
    if job.config.train.gradient_checkpointing:
        return None
    return _with(job, gradient_checkpointing=True)


def _smaller_micro_batch(job: Job) -> Change | None:
    sizes, train = job.resolved, replace(job.config.train, **deepspeed_json.train_settings(job.given))
    if isinstance(train.micro_batch_tokens, int):
        return _fewer_positions(job)
    if sizes.micro_batch_size == 1:
        return None
    if train.global_batch_size is not None and train.gradient_accumulation_steps is None:  # it follows
        return _with(job, micro_batch_size=1)
    accumulation = sizes.gradient_accumulation_steps * sizes.micro_batch_size
    return _with(job, micro_batch_size=1, gradient_accumulation_steps=accumulation)


def _fewer_positions(job: Job) -> Change | None:
    """Micro-batches of as many positions as the longest example has."""
    if job.most_examples == 1:
        return None
    said = {"train.micro_batch_tokens": str(job.config.data.max_length)}
    if job.config.train.global_batch_size is None:  # it may follow from the accumulation steps, which will be others
        said["train.global_batch_size"] = str(job.resolved.global_batch_size)
    train = replace(
        job.config.train,
        micro_batch_tokens=job.config.data.max_length,
        global_batch_size=job.resolved.global_batch_size,
        micro_batch_size=None,
        gradient_accumulation_steps=None,
    )
    return _planned(job, said, train=train)


def _shared_sequences(job: Job) -> Change | None:
    """Let all ranks of a node compute long sequences together, in micro-batches of one; the global batch stays."""
    sizes, together = job.resolved, job.hardware.gpus
    if job.together > 1 or together == 1 or job.most_examples > 1 or job.length <= LONG or job.config.data.packing:
        return None
    accumulation = sizes.gradient_accumulation_steps * sizes.micro_batch_size * together
    return _with(job, sequence_parallel=together, micro_batch_size=1, gradient_accumulation_steps=accumulation)


def _zero3(job: Job) -> Change | None:
    """Cut all parameters over all ranks."""
    if job.ranks == 1 or (job.stage == 3 and job.frozen_blocks == job.ranks):
        return None
    return _with_file(job, "zero3.json")


def _packed(storage: Literal["nf4", "nf4_double", "int8"]) -> Callable[[Job], Change | None]:
    def pack(job: Job) -> Change | None:
        if job.storage.quantised:
            return None
        residual = replace(job.config.residual, storage=storage)
        return _planned(job, {"residual.storage": storage}, residual=residual)

    return pack


def _offload(job: Job) -> Change | None:
    if job.offloaded("param"):
        return None
    return _with_file(job, "zero3_offload.json")


_STEPS: tuple[Callable[[Job], Change | None], ...] = (
    _checkpointing, _smaller_micro_batch, _shared_sequences, _zero3, _packed("nf4"), _packed("nf4_double"), _offload,
)  # fmt: skip
"""Cheapest first: what costs time before what costs precision, and the host's memory last."""


def _with(job: Job, **train) -> Change | None:
    given = {key: "auto" if deepspeed_json.ONE_PLACE.get(key) in train else value for key, value in job.given.items()}
    words = {f"train.{name}": str(value).lower() for name, value in train.items()}
    return _planned(job, words, given, train=replace(job.config.train, **train))


def _with_file(job: Job, name: str) -> Change | None:
    """The job with a DeepSpeed JSON that ships; what its own JSON says of training moves to the command line."""
    given = deepspeed_json.read_ds_config(SHIPPED / "ds_configs" / name)
    train = job.config.train
    said = {
        field: value
        for field, value in deepspeed_json.train_settings(job.given).items()
        if getattr(train, field) in (None, "auto")  # what the run's own settings say is said already
    }
    words = {"--ds_config": f"ds_configs/{name}"} | {f"train.{field}": str(value) for field, value in said.items()}
    return _planned(job, words, given, train=replace(train, **said))


def _planned(job: Job, words: dict[str, str], given: dict | None = None, **sections) -> Change | None:
    """The job with other settings; None where they do not go with the other ones."""
    try:
        return Change(words, Job.of(replace(job.config, **sections), given or job.given, job.hardware))
    except ValueError:
        return None
