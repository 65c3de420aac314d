"""The sections of the DeepSpeed JSON: each is checked, and what it leaves open is resolved.

The word "auto" counts as not said. Every function that takes `zero` works on a copy of the zero_optimization section
and changes it in place.
"""

import json
from typing import Any

from pydantic import ValidationError

Json = dict[str, Any]

BUFFERS = ("overlap_comm", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size",
           "stage3_param_persistence_threshold")  # fmt: skip
"""Keys of zero_optimization that memory depends on (`sorsa_ds.plan`). Where the JSON does not say one of them,
DeepSpeed's own default is written out."""


def said(section: Json, key: str) -> Any:
    """The value of a key; None where it is absent or "auto"."""
    value = section.get(key)
    return None if value == "auto" else value


def subsection(parent: Json, key: str) -> Json:
    """A copy of an object inside another, empty where it is absent.

    Raises:
        ValueError: the value is not an object.
    """
    value = said(parent, key)
    if not isinstance(value, dict | None):
        raise ValueError(f'DeepSpeed JSON: "{key}" is {json.dumps(value)}: must be an object {{...}}')
    return dict(value or {})


def number(section: Json, key: str, minimum: float = 0) -> float | None:
    """A finite number of at least `minimum`; None where it is not said.

    Raises:
        ValueError: the value is something else.
    """
    value = said(section, key)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value < 1e308):
        return value
    raise ValueError(f'DeepSpeed JSON: "{key}" is {json.dumps(value)}: must be a number >= {minimum}, or "auto"')


def integer(section: Json, key: str, minimum: int = 1) -> int | None:
    """A whole number of at least `minimum`; None where it is not said.

    Raises:
        ValueError: the value is something else.
    """
    value = number(section, key, minimum)
    if not isinstance(value, int | None):
        raise ValueError(f'DeepSpeed JSON: "{key}" is {value}: must be a whole number')
    return value


def resolve_stage(zero: Json) -> int:
    """The ZeRO stage, which is written into the section; 0 where the JSON has none.

    Raises:
        ValueError: the stage is none of 0, 1, 2 and 3.
    """
    if zero.get("stage") == "auto":
        raise ValueError('DeepSpeed JSON: "zero_optimization.stage" is "auto": write 0, 1, 2 or 3')
    stage = integer(zero, "stage", minimum=0) or 0
    if stage > 3:
        raise ValueError(f'DeepSpeed JSON: "zero_optimization.stage" is {stage}: must be 0, 1, 2 or 3')
    zero["stage"] = stage
    return stage


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
    size = integer(zero, key) or node_ranks
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
    if any(ds["bf16"].get(key) for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states")):
        raise ValueError('DeepSpeed JSON: "bf16" without fp32 masters is not supported: the regulariser works on them')
    if precision == "mixed":
        dtype = said(ds["torch_autocast"], "dtype") or "bfloat16"
        if dtype not in ("bfloat16", "bf16", "torch.bfloat16"):
            raise ValueError(f'DeepSpeed JSON: "torch_autocast.dtype" is {dtype}: only bfloat16 is supported')
        ds["torch_autocast"]["dtype"] = dtype
        # By default DeepSpeed averages the gradients of every nn.Linear in bf16. SorsaLinear is none, but the other
        # methods train such layers, and would be compared at a lower precision.
        ds["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    if precision == "bf16":
        types = ds["data_types"] = subsection(ds, "data_types")
        accumulated = said(types, "grad_accum_dtype")
        types.pop("grad_accum_dtype", None)
        if stage > 0:  # stage 0 has no fp32 accumulation: DeepSpeed raises NotImplementedError
            types["grad_accum_dtype"] = accumulated or "fp32"
