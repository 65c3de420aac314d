"""Every key that DeepSpeed knows in its JSON: what a value may be where it is passed on, or why it is refused.

Both lists are explicit. A key in neither is an error, because DeepSpeed would ignore it, and a key of a later DeepSpeed
is in neither until somebody has looked at what it does: a test compares both lists with what DeepSpeed asks for.
Sections are named by their dotted path, and the JSON itself by an empty text.
"""

import difflib
import functools
import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from sorsa_ds.config.declare import BatchSize, NonNegativeFloat, Text
from sorsa_ds.config.fields import describe_type
from sorsa_ds.runtime.words import cut

Json = dict[str, Any]


def _whole(value: Any) -> Any:
    """A whole number, also where JSON has it as a power such as 2e8."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError("not a whole number")
    return int(value)


_WHOLE = BeforeValidator(_whole)
Flag = Annotated[bool, Strict()]
Count = Annotated[int, _WHOLE, Field(ge=0, le=sys.maxsize)]
Size = Annotated[int, _WHOLE, Field(ge=1, le=sys.maxsize)]
SECTION = object()
"""Stands for an object whose own keys are listed under its path."""

_SCALING = ("auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
            "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads")  # fmt: skip
PASSED: dict[str, dict[str, Any]] = {
    "": {
        "train_batch_size": Annotated[BatchSize, _WHOLE],
        "train_micro_batch_size_per_gpu": Annotated[BatchSize, _WHOLE],
        "gradient_accumulation_steps": Annotated[BatchSize, _WHOLE],
        "gradient_clipping": NonNegativeFloat,
        "bf16": SECTION,
        "fp16": SECTION,
        "torch_autocast": SECTION,
        "zero_optimization": SECTION,
        "data_types": SECTION,
        "comms_logger": SECTION,
        "flops_profiler": SECTION,
        "steps_per_print": Annotated[int, _WHOLE, Field(ge=1, le=10**9)],
        "wall_clock_breakdown": Flag,
        "memory_breakdown": Flag,
        "dump_state": Flag,
    },
    "bf16": {"enabled": Flag, "immediate_grad_update": Flag, "check_grad_overflow": Flag},
    "fp16": {"enabled": Flag, **dict.fromkeys(_SCALING, Any)},
    "torch_autocast": {
        "enabled": Flag,
        "dtype": Literal["bfloat16", "bf16", "torch.bfloat16"],
        "lower_precision_safe_modules": list[Text],
    },
    "data_types": {"grad_accum_dtype": Literal["fp32", "bf16"], "keep_in_fp32_modules": list[Text]},
    "comms_logger": {"enabled": Flag, "prof_all": Flag, "prof_ops": list[Text], "verbose": Flag, "debug": Flag},
    "flops_profiler": {
        "enabled": Flag,
        "recompute_fwd_factor": NonNegativeFloat,
        "profile_step": Size,
        "module_depth": Annotated[int, _WHOLE, Field(ge=-1, le=10**9)],
        "top_modules": Size,
        "detailed": Flag,
        "output_file": Text,
    },
    "zero_optimization": {
        "stage": Annotated[int, _WHOLE, Field(ge=0, le=3)],
        "contiguous_gradients": Flag,
        "reduce_scatter": Flag,
        "reduce_bucket_size": Size,
        "use_multi_rank_bucket_allreduce": Flag,
        "allgather_partitions": Flag,
        "allgather_bucket_size": Size,
        "overlap_comm": Flag,
        "offload_param": SECTION,
        "offload_optimizer": SECTION,
        "leaf_module": SECTION,
        "sub_group_size": Size,
        "stage3_prefetch_bucket_size": Count,
        "stage3_param_persistence_threshold": Count,
        "stage3_model_persistence_threshold": Count,
        "stage3_max_live_parameters": Count,
        "stage3_max_reuse_distance": Count,
        "stage3_module_granularity_threshold": Count,
        "stage3_use_all_reduce_for_fetch_params": Flag,
        "stage3_allgather_sequential": Flag,
        "ignore_unused_parameters": Flag,
        "parameter_alignment": Flag,
        "zero_hpz_partition_size": Size,
        "memory_efficient_linear": Flag,
        "override_module_apply": Flag,
        "log_trace_cache_warnings": Flag,
        "enable_sanity_checks": Flag,
    },
    "zero_optimization.offload_param": {"device": Literal["none", "cpu", "nvme"], "pin_memory": Flag},
    "zero_optimization.offload_optimizer": {"device": Literal["none", "cpu", "nvme"], "pin_memory": Flag},
    "zero_optimization.leaf_module": {"classes": list[Text], "names": list[Text], "name_suffixes": list[Text]},
}
"""The keys that are passed on to DeepSpeed, by section, with the type of their value; "auto" may stand for any.

The section `fp16` is removed instead: it may only say that fp16 is not enabled.
"""


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a key is refused. harmless: the value with which it changes nothing, so that it may stand there."""

    reason: str
    harmless: Any = False


_ONE_OPTIMIZER = "there is one optimizer and one scheduler, set by train.learning_rate, train.schedule and so on"
_AVERAGING = "the gradients' order of averaging and clipping is part of the method"
_TRAVEL = "gradients travel in the precision that train.precision sets"
_RECOMPUTE = "write train.gradient_checkpointing=true instead"
_OWN_LOGS = "runs are logged by output.wandb and in the run's folder"
_OWN_CHECKPOINTS = "checkpoints are this program's own, set by output.save_every and output.keep_checkpoints"
_OWN_DATA = "the order of the data is this program's own"
_REMOVED = "DeepSpeed has removed it"
REFUSED: dict[str, str] = {
    "optimizer": _ONE_OPTIMIZER,
    "scheduler": _ONE_OPTIMIZER,
    "elasticity": "the batch size is fixed for a run",
    "tensor_parallel": "SORSA layers are not cut inside a layer",
    "autotp": "SORSA layers are not cut inside a layer",
    "expert_parallel": "experts are not spread over ranks",
    "use_data_before_expert_parallelism": "experts are not spread over ranks",
    "hybrid_engine": "it is for generation inside RLHF",
    "pipeline": "layers are not spread over pipeline stages",
    "sequence_parallel_size": "write train.sequence_parallel instead",
    "seq_parallel_communication_data_type": "sequences are not cut over ranks",
    "bfloat16": "write bf16",
    "amp": "write bf16",
    "prescale_gradients": _AVERAGING,
    "gradient_predivide_factor": _AVERAGING,
    "gradient_allreduce_op": _AVERAGING,
    "managed_gradient_accumulation": _AVERAGING,
    "communication_data_type": _TRAVEL,
    "activation_checkpointing": _RECOMPUTE,
    "autotuning": "launch/plan.py finds settings that fit",
    "compile": "the step that holds the regulariser is not compiled",
    "data_efficiency": _OWN_DATA,
    "dataloader_drop_last": _OWN_DATA,
    "checkpoint": _OWN_CHECKPOINTS,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "tensorboard": _OWN_LOGS,
    "wandb": _OWN_LOGS,
    "csv_monitor": _OWN_LOGS,
    "comet": _OWN_LOGS,
    "timers": "tokens per second are measured and logged by the trainer",
    "log_level": "DeepSpeed's messages are left as they are",
    "disable_python_gc": "commands look for garbage rarely by themselves",
    "disable_allgather": "DeepSpeed ignores it",
    "vocabulary_size": "DeepSpeed only warns about it",
    "weight_quantization": "residual.storage quantises the frozen weights",
    "aio": "it is for offloading to NVMe, which is not supported",
    "compression_training": _REMOVED,
    "curriculum_learning": _REMOVED,
    "eigenvalue": _REMOVED,
    "graph_harvesting": _REMOVED,
    "nebula": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
}
"""The keys of the JSON itself that are refused, with the reason."""

_OTHER_WEIGHTS = "gathered weights would not be the ones that were decomposed"
_NVME = "it is for offloading to NVMe, which is not supported"
_PASSES_BY = "its optimizer step does not pass the regulariser"
HARMLESS: dict[str, dict[str, Refused]] = {
    "": {
        "zero_force_ds_cpu_optimizer": Refused("the optimizer is PyTorch's AdamW, which DeepSpeed wraps"),
        "zero_allow_untested_optimizer": Refused("the optimizer is PyTorch's AdamW, which DeepSpeed must accept", True),
    },
    "bf16": dict.fromkeys(
        ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
        Refused("the regulariser works on fp32 masters"),
    ),
    "data_types": dict.fromkeys(
        ("param_dtype", "buffer_dtype"), Refused("train.precision sets the number formats", None)
    ),
    "zero_optimization": {
        "round_robin_gradients": Refused("it deals the masters out in an order that DeepSpeed does not record"),
        "zero_quantized_weights": Refused(_OTHER_WEIGHTS),
        "zero_quantized_nontrainable_weights": Refused(_OTHER_WEIGHTS),
        "zero_quantized_gradients": Refused("it is not tested with SORSA"),
        "zenflow": Refused(_PASSES_BY, None),
        "compute_grad_norm": Refused("the gradient's norm is logged and clipped", True),
        "legacy_stage1": Refused(_REMOVED),
        "mics_shard_size": Refused(
            "DeepSpeed has removed MiCS; zero_hpz_partition_size keeps the residual inside a node"
        ),
        "mics_hierarchical_params_gather": Refused("DeepSpeed has removed MiCS"),
        "zeropp_loco_param": Refused(_REMOVED),
        "cpu_offload": Refused("write offload_optimizer", None),
        "cpu_offload_param": Refused("write offload_param", None),
        "cpu_offload_params": Refused("write offload_param", None),
        "cpu_offload_use_pin_memory": Refused("write offload_optimizer.pin_memory", None),
        "load_from_fp32_weights": Refused(_OWN_CHECKPOINTS, True),
        "elastic_checkpoint": Refused(_OWN_CHECKPOINTS),
        "pipeline_loading_checkpoint": Refused(_OWN_CHECKPOINTS),
        "stage3_gather_16bit_weights_on_model_save": Refused("launch/export.py writes the merged model"),
        "stage3_gather_fp16_weights_on_model_save": Refused("launch/export.py writes the merged model"),
        "save_muon_momentum_buffer_in_memory": Refused("the optimizer is AdamW"),
    },
    "zero_optimization.offload_param": {
        "nvme_path": Refused(_NVME, None),
        "buffer_count": Refused(_NVME, 5),
        "buffer_size": Refused(_NVME, 10**8),
        "max_in_cpu": Refused(_NVME, 10**9),
    },
    "zero_optimization.offload_optimizer": {
        "nvme_path": Refused(_NVME, None),
        "buffer_count": Refused(_NVME, 4),
        "pipeline_read": Refused(_NVME),
        "pipeline_write": Refused(_NVME),
        "fast_init": Refused(_NVME),
        "ratio": Refused("the optimizer is PyTorch's AdamW, which DeepSpeed cannot split between GPU and CPU", 1.0),
        "super_offload": Refused(_PASSES_BY),
        "cpuadam_cores_perc": Refused("it goes with super_offload, whose step does not pass the regulariser", 0.8),
    },
}
"""The keys that are refused unless they have the one value that changes nothing, by section. It is DeepSpeed's default,
or what this program writes anyway. As anywhere, "auto" may stand for it."""

_SHORT = ("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
          "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
          "use_all_reduce_for_fetch_params", "allgather_sequential")  # fmt: skip
UNDOCUMENTED = {name: f"stage3_{name}" for name in _SHORT}
"""Keys of zero_optimization that DeepSpeed takes beside their documented names, name -> documented name."""


def checked(raw: Json) -> Json:
    """A copy of a DeepSpeed JSON, in which every key and value has been checked by itself.

    Whole numbers that are written as powers, such as 2e8, are integers in the copy.

    Raises:
        ValueError: naming the first key that is refused or not known, or whose value has another type or is out of
            range; with the reason, or what is allowed.
    """
    for key, reason in REFUSED.items():
        if key in raw:
            raise ValueError(f'DeepSpeed JSON: "{key}" is not supported: {reason}; remove it')
    return _checked_section("", raw)


def without_auto(ds: Json) -> Json:
    """The JSON without the keys that say "auto", but for those of zero_optimization, which has its own rules."""
    kept: Json = {}
    for key, value in ds.items():
        if isinstance(value, dict) and key != "zero_optimization":
            kept[key] = without_auto(value)
        elif value != "auto":
            kept[key] = value
    return kept


def _checked_section(path: str, section: Json) -> Json:
    """The checked copy of one section, and of the sections inside it."""
    copy: Json = {}
    for key, value in section.items():
        name = cut(f"{path}.{key}" if path else key)
        if not path and key.startswith("_"):
            copy[key] = value  # a comment
        elif key in HARMLESS.get(path, {}):
            copy[key] = _harmless(name, HARMLESS[path][key], value)
        elif key not in PASSED[path]:
            raise ValueError(f'DeepSpeed JSON: "{name}" is not a key that this trainer passes on{_hint(path, key)}')
        elif PASSED[path][key] is SECTION:
            if not isinstance(value, dict | None) and value != "auto":
                raise ValueError(f'DeepSpeed JSON: "{name}" is {cut(json.dumps(value), 80)}: must be an object {{...}}')
            copy[key] = _checked_section(name, value if isinstance(value, dict) else {})
        else:
            copy[key] = value if value == "auto" else _value(name, PASSED[path][key], value)
    return copy


def _harmless(name: str, key: Refused, value: Any) -> Any:
    """The value of a key that may stand only where it changes nothing."""
    same = value == key.harmless and isinstance(value, bool) is isinstance(key.harmless, bool)
    if not same and value != "auto":
        raise ValueError(f'DeepSpeed JSON: "{name}" is not supported: {key.reason}; remove it')
    return value


def _value(name: str, kind: Any, value: Any) -> Any:
    """The value of a key that is passed on, in its type."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(
            f'DeepSpeed JSON: "{name}" is {cut(json.dumps(value), 80)}: must be {describe_type(kind)}, or "auto"'
        ) from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config={"strict": True})


def _hint(path: str, key: str) -> str:
    """Which key may have been meant, or which there are."""
    if path == "zero_optimization" and key in UNDOCUMENTED:
        return f'; write "{UNDOCUMENTED[key]}"'
    near = difflib.get_close_matches(key, PASSED[path], n=1)
    return f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(sorted(PASSED[path]))}"
