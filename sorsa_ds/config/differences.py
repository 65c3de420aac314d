"""Which settings may change when a run is continued, and in which settings two runs differ."""

from dataclasses import asdict
from typing import Any

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_io import flat

FREE_OF_ONE_MODEL = (
    "loading.",
    "output.",
    "evaluation.",
    "analysis.",
    "sorsa.svd_cache",
    "data.packing",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.sequence_parallel",
    "train.gradient_accumulation_steps",
    "train.gradient_checkpointing",
    "train.loss_chunk",
    "train.compile",
    "train.check_memory",
    "train.deterministic",
    "train.eval_every",
    "train.max_start_gap",
    "train.profile_steps",
    "train.profile_trace",
    "train.timeout_minutes",
)
"""Settings and sections that may change between two parts of one run on the same model, because they move no result."""
FREE = ("model", "sorsa.directions", *FREE_OF_ONE_MODEL)
"""Settings and sections that may change when a run is continued. The model's folder may have moved: the digests of its
weights are compared instead. A file of directions is read at the beginning only."""
LENGTH = ("train.steps", "train.epochs")
"""Settings of how long a run is. A run that is continued may become longer, and one that was stopped on its way shorter
too, though not than it is already."""
RESOLVED = (
    "train.learning_rate",
    "train.precision",
    "train.global_batch_size",
    "train.gradient_clipping",
    "residual.storage",
)
"""Settings that a run resolves where they are unset or `auto`. Left open again, they take the values they had."""


def differences(config: RunConfig, saved: dict, free: tuple[str, ...] = FREE) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from those of a saved run, as path -> (then, now).

    Args:
        saved: the saved run's settings as a nested dictionary. A setting that its version did not have yet counts as at
            its default.
        free: settings and sections that may differ. Settings that are left open now are not compared either.
    """
    default, before, now = (flat(one, schema=RunConfig) for one in (asdict(RunConfig()), saved, asdict(config)))
    then = default | before
    return {
        name: (then[name], value)
        for name, value in now.items()
        if (value != then[name] or isinstance(value, bool) != isinstance(then[name], bool))  # True == 1 in Python
        and not name.startswith(free)
        and not (name in RESOLVED and value in (None, "auto"))
    }
