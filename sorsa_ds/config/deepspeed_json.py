"""The DeepSpeed JSON, resolved against the run configuration and the machine.

Each quantity has one place of truth: the JSON or the run configuration. What neither says is filled in ("auto" counts
as not said, except for the micro-batch, which the planner chooses then); what both say differently is refused. Defaults
of DeepSpeed that matter are written out, so that the resolved JSON shows all that DeepSpeed will do.
"""

import copy
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sorsa_ds.config.batch_size import AUTO, resolve_batch_sizes
from sorsa_ds.config.deepspeed_sections import (
    Json,
    integer,
    number,
    resolve_buffers,
    resolve_node_sharding,
    resolve_number_formats,
    resolve_offload,
    resolve_stage,
    said,
    subsection,
)
from sorsa_ds.config.schema import TrainConfig

_ONE_OPTIMIZER = "there is one optimizer and one scheduler, set by train.learning_rate, train.warmup_ratio and so on"
REFUSED = {
    "optimizer": _ONE_OPTIMIZER,
    "scheduler": _ONE_OPTIMIZER,
    "elasticity": "the batch size is fixed for a run",
    "tensor_parallel": "SORSA layers are not cut inside a layer",
    "autotp": "SORSA layers are not cut inside a layer",
    "expert_parallel": "experts are not spread over ranks",
    "hybrid_engine": "it is for generation inside RLHF",
    "pipeline": "layers are not spread over pipeline stages",
    "sequence_parallel_size": "sequences are not cut over ranks",
    "bfloat16": "write bf16",
    "amp": "write bf16",
    "prescale_gradients": "the gradients' order of averaging and clipping is part of the method",
    "gradient_predivide_factor": "the gradients' order of averaging and clipping is part of the method",
    "communication_data_type": "gradients travel in the precision that train.precision sets",
}
REFUSED_ZERO = {
    "round_robin_gradients": "it deals the masters out in an order that DeepSpeed does not record",
    "zero_quantized_weights": "gathered weights would not be the ones that were decomposed",
    "zero_quantized_nontrainable_weights": "gathered weights would not be the ones that were decomposed",
    "zero_quantized_gradients": "it is not tested with SORSA",
    "cpu_offload": "write offload_optimizer",
    "cpu_offload_params": "write offload_param",
    "cpu_offload_use_pin_memory": "write offload_optimizer.pin_memory",
    "zenflow": "its optimizer step does not pass the regulariser",
    "mics_shard_size": "DeepSpeed has removed MiCS; zero_hpz_partition_size keeps the residual inside a node",
}
KNOWN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "fp16", "torch_autocast", "zero_optimization", "data_types", "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "comms_logger", "flops_profiler", "aio",
}  # fmt: skip
"""Top-level keys that are passed on to DeepSpeed. Any other key is an error, because DeepSpeed would ignore it."""

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

    micro_choices: the micro-batches that the planner has to choose from; empty where the micro-batch is settled.
    """

    ds: Json
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    gradient_clipping: float
    zero_stage: int
    micro_choices: tuple[int, ...] = ()

    def with_micro_batch(self, size: int) -> "Resolved":
        """The same global batch in micro-batches of one of the sizes that were left to choose from."""
        assert size in self.micro_choices
        accumulation = self.gradient_accumulation_steps * self.micro_batch_size // size
        ds = self.ds | {MICRO_BATCH: size, "gradient_accumulation_steps": accumulation}
        return replace(self, ds=ds, micro_batch_size=size, gradient_accumulation_steps=accumulation, micro_choices=())


def read_ds_config(path: Path) -> Json:
    """Read a DeepSpeed JSON.

    Raises:
        ValueError: the file cannot be read, or is not valid JSON; with file, line and column.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}:1:1: an object {{...}} of DeepSpeed settings is expected")
    return raw


def _no_repeats(pairs: list[tuple[str, Any]]) -> Json:
    """A JSON object from its pairs; a ValueError where a key appears twice, of which Python would keep the last."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f'"{key}" is set twice')
    return dict(pairs)


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
) -> Resolved:
    """The JSON with everything filled in and checked. The given one is not changed.

    Args:
        raw: the JSON as the user wrote it.
        precision: as `sorsa_ds.runtime.precision.resolve_precision` has resolved it.
        node_ranks: ranks of each node; 0 if nodes differ or it is not known; None: all are on one node.

    Raises:
        ValueError: a key or value cannot be used. The message names the key, both values where two differ, and what to
            write instead.
    """
    _check_keys(raw)
    ds = copy.deepcopy(raw)
    zero = ds["zero_optimization"] = subsection(raw, "zero_optimization")
    stage = resolve_stage(zero)
    resolve_offload(zero, "offload_optimizer", range(1, 4), device)
    resolve_offload(zero, "offload_param", range(3, 4), device)
    resolve_node_sharding(zero, world_size, world_size if node_ranks is None else node_ranks)
    resolve_buffers(zero)
    resolve_number_formats(ds, precision, stage)

    sizes = resolve_batch_sizes(
        world_size,
        global_size=_once(raw, "train_batch_size", train, integer),
        micro=_once(raw, MICRO_BATCH, train, integer) or (AUTO if raw.get(MICRO_BATCH) == AUTO else None),
        accumulation=_once(raw, "gradient_accumulation_steps", train, integer),
    )
    clipping = _once(raw, "gradient_clipping", train, number)
    clipping = 1.0 if clipping is None else float(clipping)
    ds |= {
        "train_batch_size": sizes.global_size,
        MICRO_BATCH: sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": clipping,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is PyTorch's AdamW, which DeepSpeed wraps
        "zero_allow_untested_optimizer": True,
        "steps_per_print": integer(raw, "steps_per_print") or 10**9,  # the trainer prints
        "wall_clock_breakdown": bool(said(raw, "wall_clock_breakdown")),
    }
    return Resolved(ds, sizes.micro, sizes.accumulation, sizes.global_size, clipping, stage, sizes.choices)


def _check_keys(raw: Json) -> None:
    """Raise a ValueError for a key that is not supported, with the reason, or that is not known."""
    for key, reason in REFUSED.items():
        if key in raw:
            raise ValueError(f'DeepSpeed JSON: "{key}" is not supported: {reason}; remove it')
    for key in raw:
        if key not in KNOWN and not key.startswith("_"):
            near = difflib.get_close_matches(key, KNOWN, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(sorted(KNOWN))}"
            raise ValueError(f'DeepSpeed JSON: "{key}" is not a key that this trainer passes on{hint}')
    zero = subsection(raw, "zero_optimization")
    for key, reason in REFUSED_ZERO.items():
        if zero.get(key):
            raise ValueError(f'DeepSpeed JSON: "zero_optimization.{key}" is not supported: {reason}; remove it')


def check_zero_keys(raw: Json, file: Path) -> None:
    """Check that DeepSpeed knows all keys of zero_optimization: with a misspelt `stage` it would train without ZeRO.

    Raises:
        ValueError: DeepSpeed does not know some of the keys. The message names these keys and the file.
    """
    unknown = unknown_zero_keys(raw)
    if unknown:
        raise ValueError(f"{file}: zero_optimization has no {', '.join(map(repr, unknown))}; DeepSpeed would ignore it")


def unknown_zero_keys(raw: Json) -> list[str]:
    """The keys of zero_optimization and its offload sections that DeepSpeed does not know and would silently ignore.

    Keys that `resolve_ds_config` refuses are left out: that error explains them better.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "": DeepSpeedZeroConfig,
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    zero = subsection(raw, "zero_optimization")
    unknown = []
    for name, model in models.items():
        known = {field.alias or key for key, field in model.model_fields.items()} | set(model.model_fields)
        prefix = f"zero_optimization.{name}." if name else "zero_optimization."
        unknown += [prefix + key for key in (subsection(zero, name) if name else zero) if key not in known]
    return [key for key in unknown if key.removeprefix("zero_optimization.") not in REFUSED_ZERO]


def fit_buckets(ds: Json, trained: int) -> Json:
    """The resolved JSON with gradient buckets that are no larger than all gradients together.

    DeepSpeed allocates whole buckets (two of them where stages 1 and 2 overlap reductions), however little they will
    hold: that would take 1.5 GiB also for the factors of a small rank. Which gradients are reduced together does not
    change.

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


def _once(raw: Json, key: str, train: TrainConfig, read: Callable[[Json, str], Any]) -> Any:
    """The value of a quantity that the JSON or the run configuration may state; None where neither does.

    Raises:
        ValueError: both state it, and differ.
    """
    field = ONE_PLACE[key]
    in_json, in_run = read(raw, key), getattr(train, field)
    if in_json is not None and in_run is not None and in_json != in_run:
        raise ValueError(
            f'"{key}" is {in_json} in the DeepSpeed JSON, but train.{field} is {in_run}; '
            'say it in one place (write "auto" in the JSON)'
        )
    return in_json if in_run is None else in_run
