"""This process: its process group, device, threads and memory."""

import os
import resource

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from sorsa_ds import precision
from sorsa_ds.console import quiet_libraries


def start_process() -> str:
    """Settle this process: quiet libraries, threads, TF32, process group. Returns its device type, `cuda` or `cpu`."""
    quiet_libraries()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cpu":
        precision.set_threads(local_ranks())
    precision.allow_tf32(device_type)
    init_distributed()
    return device_type


def local_ranks() -> int:
    """Processes of this job on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def init_distributed() -> None:
    """Start the process group, for one process too, without compiling extensions that the run does not need."""
    if not torch.cuda.is_available():
        # The first collective on a CPU would otherwise compile a shared-memory kernel for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def this_device() -> torch.device:
    """The device on which this rank computes."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def memory_gib() -> float:
    """Peak GPU memory of this rank in GiB, or its resident memory now where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def peak_resident_gib() -> float:
    """The largest resident memory that this process ever had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory_gib() -> float:
    """Peak GPU memory of this rank in GiB, or its largest resident memory where there is no GPU."""
    return memory_gib() if torch.cuda.is_available() else peak_resident_gib()
