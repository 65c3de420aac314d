"""The device on which this process computes. Every room asks here, so that all parts of a run agree.

It is a GPU where torch sees one, unless DS_ACCELERATOR=cpu (the variable that DeepSpeed reads too) asks for the CPU.
A GPU that is there, but that torch cannot use, is an error: a run would otherwise train on the CPU unnoticed.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from sorsa_ds.runtime.precision import Device

ACCELERATOR = "DS_ACCELERATOR"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The variables with which a user sets up PyTorch's allocator; the second is the older name."""
DEVICE_FILES = Path("/dev")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA's major version -> the first driver that runs it (NVIDIA's CUDA compatibility guide)."""


def device_type() -> Device:
    """The type of the device on which this process computes.

    Raises:
        ValueError: there is a GPU that torch cannot use, or DS_ACCELERATOR asks for something that is not there.
    """
    asked = os.environ.get(ACCELERATOR, "")
    if asked not in ("", "cpu", "cuda"):
        raise ValueError(f"{ACCELERATOR}={asked}: sorsa_ds computes on cuda or on cpu; unset it, or set one of these")
    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    _refuse_unseen_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if asked == "cuda":
        raise ValueError(f"{ACCELERATOR}=cuda, but this machine shows no NVIDIA GPU; unset it to compute on the CPU")
    return "cpu"


def this_device() -> torch.device:
    """The device on which this rank computes: the GPU of its local rank (the first one where no launcher gives a
    rank), or the CPU.

    Raises:
        ValueError: there is a GPU that torch cannot use, or DS_ACCELERATOR asks for something that is not there (see
            `device_type`).
    """
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of a GPU's memory.

    total: all of it. free: what no process holds. held: what PyTorch holds in this process, in use or not.
    """

    total: int
    free: int
    held: int


def gpu_memory() -> GpuMemory:
    """The memory of the GPU of this process at this moment. It starts CUDA, which takes some of it."""
    free, total = torch.cuda.mem_get_info()
    return GpuMemory(total, free, torch.cuda.memory_reserved())


def grow_segments() -> None:
    """Let PyTorch extend the segments of GPU memory that it holds, instead of leaving gaps between them.

    PyTorch reads the variable when its allocator is first used (seen with 2.13), and importing bitsandbytes starts
    CUDA, so this has to be called before that import. For training only: vLLM's GPUs cannot share such memory. The
    launch scripts set it too (launch/common.sh). It is left alone where the user has set up the allocator.
    """
    if not torch.cuda.is_initialized() and not any(os.environ.get(name) for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def return_cached_memory(device: torch.device) -> None:
    """Give the memory of a GPU back that PyTorch holds for this process and does not use; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@cache
def _refuse_unseen_gpu(visible: str | None) -> None:
    """Stop where the machine has a GPU though torch sees none.

    Args:
        visible: CUDA_VISIBLE_DEVICES. An empty list, or -1, hides the GPUs on purpose.
    """
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return
    driver = _driver()
    if driver is None and not any(DEVICE_FILES.glob("nvidia[0-9]*")):
        return
    found = f"this machine has an NVIDIA GPU (driver {driver or 'unknown'}), but torch {torch.__version__}"
    anyway = f"{ACCELERATOR}=cpu computes on the CPU all the same"
    if torch.version.cuda is None:
        raise ValueError(f"{found} is built without CUDA; install torch with CUDA (docs/install.md). {anyway}")
    major = int(torch.version.cuda.split(".")[0])
    hidden = f"; CUDA_VISIBLE_DEVICES={visible} may name a GPU that is not there" if visible else ""
    needs = f" (driver {_OLDEST_DRIVER[major]} or newer)" if major in _OLDEST_DRIVER else ""
    raise ValueError(
        f"{found}, built for CUDA {torch.version.cuda}, cannot use it. Install a driver for CUDA {major}{needs}, or "
        f"the torch build for this driver's CUDA version (docs/install.md){hidden}. {anyway}"
    )


def _driver() -> str | None:
    """The version of the NVIDIA driver, `unknown` where it has none to tell; None where there is no GPU."""
    with_version = r"\b(\d{3,}\.\d+(?:\.\d+)?)\b"
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        text = done.stdout if done.returncode == 0 else ""
        if not text.strip():
            return None
    found = re.search(with_version, text)
    return found[1] if found else "unknown"
