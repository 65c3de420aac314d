"""The sections of the DeepSpeed JSON: each is checked, and what it leaves open is resolved.

Each value by itself has been checked before (`sorsa_ds.config.deepspeed_keys`); here is what depends on others. "auto"
counts as not said. Every function that takes `zero` works on a copy of the zero_optimization section and changes
it in place.
"""

import json
from typing import Any

from pydantic import ValidationError

from sorsa_ds.config.deepspeed_keys import Json

BUFFERS = ("overlap_comm", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
           "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")  # fmt: skip
"""Keys of zero_optimization that memory depends on (`sorsa_ds.plan`). Where the JSON does not say one of them,
DeepSpeed's own default is written out."""


def said(section: Json, key: str) -> Any:
    """The value of a key; None where it is absent or "auto"."""
    value = section.get(key)
    return None if value == "auto" else value


def subsection(parent: Json, key: str) -> Json:
    """A copy of an object inside another, empty where it is absent."""
    return dict(said(parent, key) or {})


def resolve_stage(zero: Json) -> int:
    """The ZeRO stage, which is written into the section; 0 where the JSON has none.

    Raises:
        ValueError: the stage is "auto".
    """
    if zero.get("stage") == "auto":
        raise ValueError('DeepSpeed JSON: "zero_optimization.stage" is "auto": write 0, 1, 2 or 3')
    zero["stage"] = int(zero.get("stage", 0))
    return zero["stage"]


def resolve_offload(zero: Json, name: str, stages: range, device: str) -> None:
    """Check an `offload_optimizer` or `offload_param` section, and remove one that offloads nothing.

    Args:
        stages: ZeRO stages on which DeepSpeed does not ignore the section.

    Raises:
        ValueError: DeepSpeed would ignore the section, or it would not work.
    """
    section = subsection(zero, name)
    target = said(section, "device") or "none"
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


def resolve_node_sharding(zero: Json, world_size: int, node_ranks: int) -> None:
    """Resolve `zero_hpz_partition_size`, the number of ranks that share one copy of the frozen tensors.

    It becomes the number of ranks per node. It is removed where there is one node only, because nothing would change.

    Args:
        node_ranks: ranks of each node; 0 if nodes differ or it is not known.

    Raises:
        ValueError: the stage is not 3, the ranks of a node are not known, or the JSON says another number of them.
    """
    key = "zero_hpz_partition_size"
    if key not in zero:
        return
    label = f'DeepSpeed JSON: "zero_optimization.{key}"'
    if zero["stage"] != 3:
        raise ValueError(f"{label} needs ZeRO stage 3, not {zero['stage']}")
    size = said(zero, key) or node_ranks
    if node_ranks == 0 or world_size % node_ranks:
        raise ValueError(
            f"{label} needs as many ranks on every node and a launcher that says how many (LOCAL_WORLD_SIZE); remove it"
        )
    if size != node_ranks:
        raise ValueError(f'{label} is {size}, but a node has {node_ranks} ranks; write "auto", or remove it')
    if size == world_size:
        del zero[key]
    else:
        zero[key] = size


def resolve_buffers(zero: Json) -> None:
    """Write out the values that DeepSpeed gives to `BUFFERS`.

    Raises:
        ValueError: DeepSpeed would not accept a value of the section.
    """
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


def resolve_number_formats(ds: Json, precision: str, stage: int) -> None:
    """Write the bf16, torch_autocast and data_types sections that a precision means into the JSON `ds`.

    Raises:
        ValueError: the JSON says otherwise.
    """
    if said(subsection(ds, "fp16"), "enabled"):
        raise ValueError('DeepSpeed JSON: "fp16" is not supported: train with bf16 (same speed, no loss scaling)')
    ds.pop("fp16", None)
    for name, meaning in (("bf16", "bf16"), ("torch_autocast", "mixed")):
        section = subsection(ds, name)
        wanted, enabled = precision == meaning, said(section, "enabled")
        if enabled is not None and enabled is not wanted:
            raise ValueError(
                f'DeepSpeed JSON: "{name}.enabled" is {json.dumps(enabled)}, but the precision is {precision} '
                f'(train.precision); write "auto" in the JSON'
            )
        ds[name] = section | {"enabled": wanted}
    if precision == "mixed":
        ds["torch_autocast"].setdefault("dtype", "bfloat16")
        # By default DeepSpeed averages the gradients of every nn.Linear in bf16. SorsaLinear is none, but the other
        # methods train such layers, and would be compared at a lower precision.
        ds["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    types = subsection(ds, "data_types")
    accumulated = types.pop("grad_accum_dtype", None)
    if precision == "bf16" and stage > 0:  # stage 0 has no fp32 accumulation: DeepSpeed raises NotImplementedError
        types["grad_accum_dtype"] = accumulated or "fp32"
    elif precision != "bf16" and accumulated == "bf16":
        raise ValueError(
            f'DeepSpeed JSON: "data_types.grad_accum_dtype" is "bf16", but the precision is {precision}; remove it'
        )
    if types or precision == "bf16":
        ds["data_types"] = types
    else:
        ds.pop("data_types", None)
