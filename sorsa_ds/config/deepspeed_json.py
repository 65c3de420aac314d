"""The DeepSpeed JSON, settled against the run configuration and the machine.

Each quantity has one place of truth: said in the JSON or in the run configuration, filled in where neither says it
("auto" counts as not said), refused where they differ. What DeepSpeed would do behind our back is always written out.
"""

import copy
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sorsa_ds.config.batch_size import settle
from sorsa_ds.config.schema import TrainConfig

Json = dict[str, Any]

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
    "communication_data_type": "gradients travel in the precision that train.precision chooses",
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
"""Top-level keys that are passed on; DeepSpeed ignores what it does not know, so anything else is a mistake."""

BUFFERS = ("overlap_comm", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size",
           "stage3_param_persistence_threshold")  # fmt: skip
"""Keys of zero_optimization that memory depends on (`sorsa_ds.plan`): where none is said, DeepSpeed's own default is
written out."""

ONE_PLACE = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
}
"""Keys of the JSON that are settings of `train` too."""


@dataclass(frozen=True)
class Resolved:
    """The dictionary DeepSpeed gets, and the figures the trainer needs from it."""

    ds: Json
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    gradient_clipping: float
    zero_stage: int


def load(path: Path) -> Json:
    """Read a DeepSpeed JSON; ValueError with file, line and column where it is broken."""
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
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f'"{key}" is set twice')
    return dict(pairs)


def precision_from_json(raw: Json) -> Literal["bf16", "mixed"] | None:
    """The precision that the JSON asks for: its bf16 section, its torch_autocast section, or nothing."""
    if _said(_section(raw, "bf16"), "enabled") is True:
        return "bf16"
    if _said(_section(raw, "torch_autocast"), "enabled") is True:
        return "mixed"
    return None


def resolve(
    raw: Json,
    train: TrainConfig,
    world_size: int,
    device: Literal["cpu", "cuda"],
    precision: Literal["fp32", "mixed", "bf16"],
    node_ranks: int | None = None,
) -> Resolved:
    """Fill in and check everything; ValueError names the key, both values where two differ, and the way out.

    node_ranks: ranks of each node, 0 if nodes differ or it is not known; None: all are on one.
    """
    for key, reason in REFUSED.items():
        if key in raw:
            raise ValueError(f'DeepSpeed JSON: "{key}" is not supported: {reason}; remove it')
    for key in raw:
        if key not in KNOWN and not key.startswith("_"):
            near = difflib.get_close_matches(key, KNOWN, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(sorted(KNOWN))}"
            raise ValueError(f'DeepSpeed JSON: "{key}" is not a key that this trainer passes on{hint}')
    ds = copy.deepcopy(raw)
    zero = ds["zero_optimization"] = _section(raw, "zero_optimization")
    for key, reason in REFUSED_ZERO.items():
        if zero.get(key):
            raise ValueError(f'DeepSpeed JSON: "zero_optimization.{key}" is not supported: {reason}; remove it')
    if zero.get("stage") == "auto":
        raise ValueError('DeepSpeed JSON: "zero_optimization.stage" is "auto": write 0, 1, 2 or 3')
    stage = _integer(zero, "stage", minimum=0) or 0
    if stage > 3:
        raise ValueError(f'DeepSpeed JSON: "zero_optimization.stage" is {stage}: must be 0, 1, 2 or 3')
    zero["stage"] = stage
    _check_offload(zero, "offload_optimizer", range(1, 4), device)
    _check_offload(zero, "offload_param", range(3, 4), device)
    _settle_node_sharding(zero, world_size, world_size if node_ranks is None else node_ranks)
    _settle_buffers(zero)
    _settle_precision(ds, precision, stage)

    sizes = settle(
        world_size,
        global_size=_once(raw, "train_batch_size", train, _integer),
        micro=_once(raw, "train_micro_batch_size_per_gpu", train, _integer),
        accumulation=_once(raw, "gradient_accumulation_steps", train, _integer),
    )
    clipping = _once(raw, "gradient_clipping", train, _number)
    clipping = 1.0 if clipping is None else float(clipping)
    ds |= {
        "train_batch_size": sizes.global_size,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": clipping,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is PyTorch's AdamW, which DeepSpeed wraps
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _integer(raw, "steps_per_print") or 10**9,  # the trainer prints
        "wall_clock_breakdown": bool(_said(raw, "wall_clock_breakdown")),
    }
    return Resolved(ds, sizes.micro, sizes.accumulation, sizes.global_size, clipping, stage)


def check_zero_keys(raw: Json, file: Path) -> None:
    """DeepSpeed ignores what it does not know: a misspelt `stage` would silently train without ZeRO.

    Raises:
        ValueError: naming the file and the keys of zero_optimization that DeepSpeed does not know.
    """
    unknown = unknown_zero_keys(raw)
    if unknown:
        raise ValueError(f"{file}: zero_optimization has no {', '.join(map(repr, unknown))}; DeepSpeed would ignore it")


def unknown_zero_keys(raw: Json) -> list[str]:
    """Keys of zero_optimization (and its offload sections) that DeepSpeed does not know: it ignores them silently.
    Those that `resolve` refuses have a reason of their own."""
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
    zero = _section(raw, "zero_optimization")
    unknown = []
    for name, model in models.items():
        known = {field.alias or key for key, field in model.model_fields.items()} | set(model.model_fields)
        prefix = f"zero_optimization.{name}." if name else "zero_optimization."
        unknown += [prefix + key for key in (_section(zero, name) if name else zero) if key not in known]
    return [key for key in unknown if key.removeprefix("zero_optimization.") not in REFUSED_ZERO]


def _settle_precision(ds: Json, precision: str, stage: int) -> None:
    """Write the bf16 and torch_autocast sections that `precision` means; refuse a JSON that says otherwise."""
    if _said(_section(ds, "fp16"), "enabled"):
        raise ValueError('DeepSpeed JSON: "fp16" is not supported: train with bf16 (same speed, no loss scaling)')
    ds.pop("fp16", None)
    for name, meaning in (("bf16", "bf16"), ("torch_autocast", "mixed")):
        section = _section(ds, name)
        wanted, said = precision == meaning, _said(section, "enabled")
        if said is not None and said is not wanted:
            raise ValueError(
                f'DeepSpeed JSON: "{name}.enabled" is {json.dumps(said)}, but the precision is {precision} '
                f'(train.precision); write "auto" in the JSON'
            )
        ds[name] = section | {"enabled": wanted}
    if any(ds["bf16"].get(key) for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states")):
        raise ValueError('DeepSpeed JSON: "bf16" without fp32 masters is not supported: the regulariser works on them')
    if precision == "mixed":
        dtype = _said(ds["torch_autocast"], "dtype") or "bfloat16"
        if dtype not in ("bfloat16", "bf16", "torch.bfloat16"):
            raise ValueError(f'DeepSpeed JSON: "torch_autocast.dtype" is {dtype}: only bfloat16 is supported')
        ds["torch_autocast"]["dtype"] = dtype
        # By default DeepSpeed averages the gradients of every nn.Linear in bf16: those of the other methods, not ours.
        ds["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    if precision == "bf16":
        types = ds["data_types"] = _section(ds, "data_types")
        said = _said(types, "grad_accum_dtype")
        types.pop("grad_accum_dtype", None)
        if stage > 0:  # stage 0 has no fp32 accumulation: DeepSpeed raises NotImplementedError
            types["grad_accum_dtype"] = said or "fp32"


def _check_offload(zero: Json, name: str, stages: range, device: str) -> None:
    """Settle an `offload_optimizer` or `offload_param` section; refuse what would be ignored or would not work."""
    section = _section(zero, name)
    target = _said(section, "device") or "none"
    if target == "none":
        zero.pop(name, None)
        return
    label = f'DeepSpeed JSON: "zero_optimization.{name}"'
    if zero["stage"] not in stages:
        raise ValueError(f"{label} needs ZeRO stage {' or '.join(map(str, stages))}, not {zero['stage']}")
    if target == "nvme":
        raise ValueError(f"{label}: nvme is not supported, cpu is: loading and the regulariser write to memory")
    if device == "cpu":
        section["pin_memory"] = False  # there is no GPU to copy to
    zero[name] = section


def _settle_node_sharding(zero: Json, world_size: int, node_ranks: int) -> None:
    """Settle `zero_hpz_partition_size`, the ranks among which frozen tensors are cut: those of a node, or absent."""
    key = "zero_hpz_partition_size"
    if key not in zero:
        return
    label = f'DeepSpeed JSON: "zero_optimization.{key}"'
    if zero["stage"] != 3:
        raise ValueError(f"{label} needs ZeRO stage 3, not {zero['stage']}")
    size = _integer(zero, key) or node_ranks
    if node_ranks == 0 or world_size % node_ranks:
        raise ValueError(
            f"{label} needs as many ranks on every node and a launcher that says how many (LOCAL_WORLD_SIZE); remove it"
        )
    if size != node_ranks:
        raise ValueError(f'{label} is {size}, but a node has {node_ranks} ranks; write "auto", or remove it')
    if size == world_size:
        del zero[key]  # one node: nothing to keep inside it
    else:
        zero[key] = size


def _settle_buffers(zero: Json) -> None:
    """Write out what DeepSpeed makes of `BUFFERS`; refuse any value of the section that it would not take."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        understood = DeepSpeedZeroConfig(**zero).model_dump(by_alias=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *wrong["loc"])))
        raise ValueError(
            f'DeepSpeed JSON: "{key}" is {json.dumps(wrong["input"])}: {wrong["msg"]}, or "auto"'
        ) from None
    zero |= {key: understood[key] for key in BUFFERS}


def fit_buckets(ds: Json, trained: int) -> Json:
    """The resolved configuration with buckets for gradients no larger than all gradients together.

    DeepSpeed allocates a bucket whole, and two where stages 1 and 2 overlap reductions, whatever will be in them: a GiB
    and a half for the factors of a small rank. What is reduced together stays the same.

    trained: numbers that are trained.
    """
    zero = dict(ds["zero_optimization"])
    if "reduce_bucket_size" in zero:
        zero["reduce_bucket_size"] = max(1, min(zero["reduce_bucket_size"], trained))
    return {**ds, "zero_optimization": zero}


def train_settings(raw: Json) -> dict[str, Any]:
    """The settings of `train` that the JSON states."""
    stated = {field: value for key, field in ONE_PLACE.items() if (value := _said(raw, key)) is not None}
    precision = precision_from_json(raw)
    return stated if precision is None else stated | {"precision": precision}


def _once(raw: Json, key: str, train: TrainConfig, read: Callable[[Json, str], Any]) -> Any:
    """A quantity that both JSON and run configuration may state: the one value, None if neither does."""
    field = ONE_PLACE[key]
    in_json, in_run = read(raw, key), getattr(train, field)
    if in_json is not None and in_run is not None and in_json != in_run:
        raise ValueError(
            f'"{key}" is {in_json} in the DeepSpeed JSON, but train.{field} is {in_run}; '
            'say it in one place (write "auto" in the JSON)'
        )
    return in_json if in_run is None else in_run


def _said(section: Json, key: str) -> Any:
    value = section.get(key)
    return None if value == "auto" else value


def _section(parent: Json, key: str) -> Json:
    """A copy of a sub-object, empty if it is absent."""
    value = _said(parent, key)
    if not isinstance(value, dict | None):
        raise ValueError(f'DeepSpeed JSON: "{key}" is {json.dumps(value)}: must be an object {{...}}')
    return dict(value or {})


def _number(section: Json, key: str, minimum: float = 0) -> float | None:
    value = _said(section, key)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value < 1e308):
        return value
    raise ValueError(f'DeepSpeed JSON: "{key}" is {json.dumps(value)}: must be a number >= {minimum}, or "auto"')


def _integer(section: Json, key: str, minimum: int = 1) -> int | None:
    value = _number(section, key, minimum)
    if not isinstance(value, int | None):
        raise ValueError(f'DeepSpeed JSON: "{key}" is {value}: must be a whole number')
    return value
