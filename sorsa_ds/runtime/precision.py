"""The number formats and the threads that a run uses on this machine, resolved once and explained in one sentence."""

import os
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

Device = Literal["cpu", "cuda"]
Name = Literal["fp32", "mixed", "bf16"]


@dataclass(frozen=True)
class Precision:
    """The number formats of a run.

    compute_dtype: the dtype of the matrix products.
    residual_dtype: the dtype of the frozen W_r, where it is not quantised.
    factor_dtype: the dtype of U, s and V as the model holds them; the optimizer's masters are always fp32.
    why: a sentence that explains the choice.
    """

    name: Name
    compute_dtype: torch.dtype
    residual_dtype: torch.dtype
    factor_dtype: torch.dtype
    why: str


def resolve_precision(
    setting: Literal["auto", "fp32", "mixed", "bf16"], json_says: Name | None, device: Device, fast: bool | None = None
) -> Precision:
    """Resolve `train.precision` against the DeepSpeed JSON and the hardware.

    Args:
        json_says: what the JSON asks for (`sorsa_ds.config.deepspeed_json.precision_from_json`).
        fast: whether bf16 products are fast on a machine that is only planned for; None: look at this machine.

    Raises:
        ValueError: the two settings differ, or a GPU without bf16 is asked to compute in it.
    """
    if setting != "auto" and json_says not in (None, setting):
        raise ValueError(
            f"train.precision is {setting}, but the DeepSpeed JSON asks for {json_says}; "
            'say it in one place (write "auto" or nothing in the other)'
        )
    fast, hardware = _bf16(device) if fast is None else (fast, f"planned for a {device} that is not here")
    asked = setting if setting != "auto" else json_says
    name = asked or ("mixed" if fast else "fp32")
    if device == "cuda" and name != "fp32" and not fast:
        raise ValueError(f"precision {name} needs a GPU with bf16, but {hardware}; set train.precision=fp32")
    reason = "as train.precision asks" if setting != "auto" else "as the DeepSpeed JSON asks" if asked else "chosen"
    slow = "; expect it to be slow" if name != "fp32" and not fast else ""
    why = f"Precision {name} ({reason}): {hardware}{slow}."
    bf16, fp32 = torch.bfloat16, torch.float32
    compute = fp32 if name == "fp32" else bf16
    return Precision(name, compute, compute, bf16 if name == "bf16" else fp32, why)


def resolve_inference_dtype(
    setting: Literal["auto", "fp32", "bf16"], device: Device
) -> tuple[Literal["fp32", "bf16"], str]:
    """The format of weights and products of a model that is not trained, and a sentence on why it is that one."""
    fast, hardware = _bf16(device)
    name = setting if setting != "auto" else "bf16" if fast else "fp32"
    reason = "as asked" if setting != "auto" else "chosen"
    slow = "; expect it to be slow" if name == "bf16" and not fast else ""
    return name, f"Weights and products in {name} ({reason}): {hardware}{slow}."


def _bf16(device: Device) -> tuple[bool, str]:
    """Whether bf16 products are fast by what the hardware supports (timings would be noisy), and a clause on it."""
    if device == "cuda":
        gpu = torch.cuda.get_device_name()
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, f"{gpu} {'multiplies' if fast else 'does not multiply'} in bf16"
    found = [name for name, probe in _CPU_PROBES.items() if getattr(torch.cpu, probe, bool)()]
    has = " and ".join(found) if found else "neither AMX nor AVX512-BF16"
    return bool(found), f"this CPU has {has}, so bf16 products are {'fast' if found else 'slow'}"


_CPU_PROBES = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}


def set_threads(local_world_size: int) -> int:
    """Share this machine's cores among its ranks, unless the user or the launcher has set OMP_NUM_THREADS.

    DeepSpeed's launcher sets that variable only with --bind_cores_to_rank; torchrun always sets it.

    Returns:
        The number of threads of this rank.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_cores() // local_world_size or 1)
    return torch.get_num_threads()


def set_offload_threads(local_world_size: int) -> str:
    """Share the machine's cores among ranks whose GPUs leave the optimizer's step to the CPU; returns what was done.

    What the user has set OMP_NUM_THREADS to stays. torchrun's own value of 1 does not: the step would take as many
    times longer as there are cores for it.
    """
    said = os.environ.get("OMP_NUM_THREADS")
    if said is None or _set_by_torchrun():
        torch.set_num_threads(_cores() // local_world_size or 1)
        why = f"of {_cores()} cores for {local_world_size} ranks"
    else:
        why = f"as OMP_NUM_THREADS={said} says"
    return f"The optimizer's step takes place on the CPU, with {torch.get_num_threads()} threads per rank ({why})."


def _set_by_torchrun() -> bool:
    """Whether OMP_NUM_THREADS is torchrun's own, which it sets to 1 where it was started without that variable.

    /proc holds the environment with which the parent process, the launcher, was started. Where it cannot be read, the
    variable counts as the user's.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            started_with = file.read().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with)


def _cores() -> int:
    """How many physical cores of this machine this process may use."""
    every = psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return min(allowed, psutil.cpu_count(logical=False) or allowed)
