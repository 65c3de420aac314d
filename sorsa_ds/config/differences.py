"""Which settings of a run may change while it goes on, and which of two runs differ."""

from dataclasses import asdict
from typing import Any

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_io import flat

FREE_OF_ONE_MODEL = (
    "loading.",
    "output.",
    "analysis.",
    "sorsa.svd_cache",
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.gradient_checkpointing",
    "train.check_memory",
    "train.eval_every",
    "train.max_start_gap",
    "train.timeout_minutes",
)
"""Settings, or sections of them, that may change between parts of a run, the model being named alike."""
FREE = ("model", *FREE_OF_ONE_MODEL)
"""Those that may change when a run is continued. The model may have moved: its weights' digests are checked."""
SETTLED = ("train.precision", "train.global_batch_size", "train.gradient_clipping", "residual.storage")
"""Settings that a run fills in where they are unset or `auto`: then they are as they were."""


def differences(config: RunConfig, saved: dict, free: tuple[str, ...] = FREE) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from a saved run's (then, now), but for the free ones and those left to be settled."""
    then, now = flat(saved), flat(asdict(config))
    return {
        name: (then[name], value)
        for name, value in now.items()
        if name in then
        and value != then[name]
        and not name.startswith(free)
        and not (name in SETTLED and value in (None, "auto"))
    }
