"""The DeepSpeed JSON, resolved against the run configuration and the machine.

Each quantity has one place of truth: the JSON or the run configuration. What neither says is filled in ("auto" counts
as not said, except for the micro-batch, which the planner chooses then); what both say differently is refused. Defaults
of DeepSpeed that matter are written out, so that the resolved JSON shows all that DeepSpeed will do.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sorsa_ds.config.batch_size import AUTO, BatchSizes, data_ranks, resolve_batch_sizes
from sorsa_ds.config.deepspeed_keys import Json, checked, without_auto
from sorsa_ds.config.deepspeed_sections import (
    resolve_buffers,
    resolve_node_sharding,
    resolve_number_formats,
    resolve_offload,
    resolve_stage,
    said,
    subsection,
)
from sorsa_ds.config.train_settings import TrainConfig
from sorsa_ds.runtime.json_text import parse_json

MICRO_BATCH = "train_micro_batch_size_per_gpu"
ONE_PLACE = {
    "train_batch_size": "global_batch_size",
    MICRO_BATCH: "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
}
"""Keys of the JSON that are also settings of the `train` section: JSON key -> setting."""


@dataclass(frozen=True)
class Resolved:
    """The dictionary that DeepSpeed gets (`ds`), and the figures from it that the trainer needs.

    micro_choices: the micro-batches that the planner has to choose from; empty where the micro-batch is resolved.
    """

    ds: Json
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    gradient_clipping: float
    zero_stage: int
    micro_choices: tuple[int, ...] = ()

    def with_micro_batch(self, size: int) -> "Resolved":
        """These settings with the same global batch in micro-batches of one of the sizes left to choose from."""
        assert size in self.micro_choices
        accumulation = self.gradient_accumulation_steps * self.micro_batch_size // size
        ds = self.ds | {MICRO_BATCH: size, "gradient_accumulation_steps": accumulation}
        return replace(self, ds=ds, micro_batch_size=size, gradient_accumulation_steps=accumulation, micro_choices=())


def read_ds_config(path: Path) -> Json:
    """Read a DeepSpeed JSON, as it is written; every key and value by itself is checked.

    Raises:
        ValueError: the file cannot be read, or is not valid JSON (with file, line and column), or a key or value in it
            cannot be used.
    """
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(raw, dict):
            checked(raw)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}:1:1: an object {{...}} of DeepSpeed settings is expected")
    return raw


def precision_from_json(raw: Json) -> Literal["bf16", "mixed"] | None:
    """The precision that the JSON asks for: bf16 or mixed, where it enables bf16 or torch_autocast; else None."""
    if said(subsection(raw, "bf16"), "enabled") is True:
        return "bf16"
    if said(subsection(raw, "torch_autocast"), "enabled") is True:
        return "mixed"
    return None


def resolve_ds_config(
    raw: Json,
    train: TrainConfig,
    world_size: int,
    device: Literal["cpu", "cuda"],
    precision: Literal["fp32", "mixed", "bf16"],
    node_ranks: int | None = None,
    max_length: int | None = None,
) -> Resolved:
    """The JSON with everything filled in and checked. The given one is not changed.

    Args:
        raw: the JSON as the user wrote it.
        precision: the name of the precision that `sorsa_ds.runtime.precision.resolve_precision` has chosen.
        node_ranks: ranks of each node; 0 if nodes differ or it is not known; None: all are on one node.
        max_length: `data.max_length`, which matters only where `train.micro_batch_tokens` is a number.

    Raises:
        ValueError: a key or value cannot be used. The message names the key, both values where two differ, and what to
            write instead.
    """
    ds = without_auto(checked(raw))
    zero = ds["zero_optimization"] = subsection(ds, "zero_optimization")
    stage = resolve_stage(zero)
    resolve_offload(zero, "offload_optimizer", range(1, 4), device)
    resolve_offload(zero, "offload_param", range(3, 4), device)
    resolve_node_sharding(zero, world_size, world_size if node_ranks is None else node_ranks)
    resolve_buffers(zero)
    resolve_number_formats(ds, precision, stage)

    sizes = _sizes(
        world_size,
        train.sequence_parallel,
        global_size=_once(ds, "train_batch_size", train),
        micro=_once(ds, MICRO_BATCH, train) or (AUTO if raw.get(MICRO_BATCH) == AUTO else None),
        accumulation=_once(ds, "gradient_accumulation_steps", train),
        room=_room(train, max_length),
    )
    clipping = _once(ds, "gradient_clipping", train)
    clipping = 1.0 if clipping is None else float(clipping)
    ds |= {
        "train_batch_size": sizes.global_size,
        MICRO_BATCH: sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": clipping,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is PyTorch's AdamW, which DeepSpeed wraps
        "zero_allow_untested_optimizer": True,
        "steps_per_print": ds.get("steps_per_print", 10**9),  # the trainer prints
        "wall_clock_breakdown": ds.get("wall_clock_breakdown", False),
    }
    if train.sequence_parallel > 1:
        ds["sequence_parallel_size"] = train.sequence_parallel  # DeepSpeed checks the sizes of the batch with it
    return Resolved(ds, sizes.micro, sizes.accumulation, sizes.global_size, clipping, stage, sizes.choices)


def fit_buckets(ds: Json, trained: int) -> Json:
    """The resolved JSON with gradient buckets that are no larger than all gradients together.

    DeepSpeed allocates whole buckets (two of them where stages 1 and 2 overlap reductions), however little they will
    hold. Even the factors of a small rank would take 1.5 GiB. Which gradients are reduced together does not change.

    Args:
        trained: how many numbers are trained.
    """
    zero = dict(ds["zero_optimization"])
    if "reduce_bucket_size" in zero:
        zero["reduce_bucket_size"] = max(1, min(zero["reduce_bucket_size"], trained))
    return {**ds, "zero_optimization": zero}


def train_settings(raw: Json) -> dict[str, Any]:
    """The settings of the `train` section that the JSON states: setting -> value."""
    stated = {field: value for key, field in ONE_PLACE.items() if (value := said(raw, key)) is not None}
    if raw.get(MICRO_BATCH) == AUTO:
        stated["micro_batch_size"] = AUTO
    precision = precision_from_json(raw)
    return stated if precision is None else stated | {"precision": precision}


def _sizes(world_size: int, sequence_parallel: int, **sizes: Any) -> BatchSizes:
    """The sizes of the batch where so many ranks share each micro-batch.

    Raises:
        ValueError: the number of ranks is not divisible by that, or the sizes contradict each other.
    """
    ranks = data_ranks(world_size, sequence_parallel)
    try:
        return resolve_batch_sizes(ranks, **sizes)
    except ValueError as error:
        if sequence_parallel == 1:
            raise
        raise ValueError(
            f"{error}; with train.sequence_parallel={sequence_parallel}, so many ranks count as one"
        ) from None


def _room(train: TrainConfig, max_length: int | None) -> int | None:
    """How many of the longest examples a micro-batch of so many positions holds; None where it is not given so."""
    if not isinstance(train.micro_batch_tokens, int):
        return None
    assert max_length is not None, "only with it can micro_batch_tokens be resolved"
    return train.micro_batch_tokens // max_length


def _once(ds: Json, key: str, train: TrainConfig) -> Any:
    """The value of a quantity that the JSON or the run configuration may state; None where neither does.

    Raises:
        ValueError: both state it, and differ.
    """
    field = ONE_PLACE[key]
    in_json, in_run = ds.get(key), getattr(train, field)
    if in_json is not None and in_run is not None and in_json != in_run:
        raise ValueError(
            f'"{key}" is {in_json} in the DeepSpeed JSON, but train.{field} is {in_run}; '
            'say it in one place (write "auto" in the JSON)'
        )
    return in_json if in_run is None else in_run
