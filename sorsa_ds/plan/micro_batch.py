"""`train.micro_batch_size=auto`: the largest micro-batch with which a job fits into its hardware.

The global batch is resolved, so a micro-batch is one of the divisors of a rank's share of it. The larger it is, the
more memory a job takes, so the search halves the divisors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import HEADROOM, Memory, fits, memory, places
from sorsa_ds.plan.model_facts import BareModel, Facts, bare_model
from sorsa_ds.runtime.memory import GIB


@dataclass(frozen=True, slots=True)
class Sized:
    """A job whose micro-batch is resolved, with what it needs.

    choice: a sentence on how the micro-batch was chosen; None where the settings say it.
    """

    job: Job
    facts: Facts
    memory: Memory
    choice: str | None = None


class NoEstimateError(Exception):
    """What a model needs cannot be estimated, which does not keep it from being trained. The message says why."""


def size_micro_batch(folder: Path, job: Job, check: Callable[[PreTrainedModel], object] | None = None) -> Sized:
    """Settle the micro-batch of a job. It is the smallest one where none fits.

    Args:
        folder: has the model's config.json.
        check: is given the model without memory before its layers are replaced, and raises a ValueError where it cannot
            be trained.

    Raises:
        ValueError: the model cannot be built, or has no such targets or ranks; or `check` has raised it.
        NoEstimateError: the model is unlike those whose memory can be estimated.
    """
    model = bare_model(folder, job, check)
    try:
        return _settled(model, job)
    except Exception as error:  # a forward pass without memory runs the model's own code
        raise NoEstimateError(f"{type(error).__name__}: {error}") from error


def _settled(model: BareModel, job: Job) -> Sized:
    choices = job.resolved.micro_choices
    if not choices:
        return _sized(model, job)
    tried: dict[int, Sized] = {}
    smallest, beyond = 0, len(choices)  # positions: this one is taken, and this one is too large
    while beyond - smallest > 1:
        middle = (smallest + beyond) // 2
        trial = tried[middle] = _sized(model, _in_micro_batches(job, choices[middle]))
        smallest, beyond = (middle, beyond) if fits(trial.job, trial.memory) else (smallest, middle)
    best = tried.get(smallest) or _sized(model, _in_micro_batches(job, choices[smallest]))
    return replace(best, choice=_choice(best, tried.get(beyond)))


def _sized(model: BareModel, job: Job) -> Sized:
    found = model.facts(job)
    return Sized(job, found, memory(job, found))


def _in_micro_batches(job: Job, size: int) -> Job:
    return replace(job, resolved=job.resolved.with_micro_batch(size))


def _choice(best: Sized, larger: Sized | None) -> str:
    """A sentence on the micro-batch that was chosen.

    Args:
        larger: the next larger one, which does not fit; None where the global batch allows for none.
    """
    place, sizes = places(best.job, best.memory)[0], best.job.resolved
    plans = f"plans {place.needed / GIB:.1f} of {place.limit / GIB:.1f} GiB"
    if larger is None:
        why = f"the global batch of {sizes.global_batch_size} has no more for a rank"
    else:
        needed = places(larger.job, larger.memory)[0].needed / GIB
        why = f"{larger.job.resolved.micro_batch_size} would take {needed:.1f}, and {HEADROOM:.0%} are left free"
    guessed = "" if best.facts.kept.counted else "; activations are guessed"
    return f"Micro-batch {sizes.micro_batch_size}: {plans} {place.where} ({why}{guessed})."
