"""This process: its process group, device, threads and memory."""

import os
import re
import resource
from datetime import timedelta

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from sorsa_ds.runtime import collectives, precision
from sorsa_ds.runtime.console import quiet_libraries


def start_process(timeout: timedelta = collectives.TIMEOUT) -> str:
    """Settle this process: quiet libraries, threads, TF32, process group. Returns its device type, `cuda` or `cpu`.

    Raises:
        ValueError: as `init_distributed`.
    """
    quiet_libraries()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cpu":
        precision.set_threads(local_ranks())
    precision.allow_tf32(device_type)
    init_distributed(timeout)
    return device_type


def local_ranks() -> int:
    """Processes of this job on this machine, as the launcher says; 1 if it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def ranks_of_each_node() -> int:
    """As `local_ranks` where all nodes have as many, else 0; also 0 where no launcher says so. A collective call."""
    said = collectives.world_size() == 1 or not {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"}.isdisjoint(os.environ)
    found = set(collectives.gather_lists([local_ranks() if said else 0]))
    return found.pop() if len(found) == 1 else 0


def init_distributed(timeout: timedelta = collectives.TIMEOUT) -> None:
    """Start the process group, for one process too, without compiling extensions that the run does not need.

    timeout: how long a rank waits for the others, here and in every collective afterwards.

    Raises:
        ValueError: not all ranks have come; says how many have, where that is known.
    """
    if not torch.cuda.is_available():
        # The first collective on a CPU would otherwise compile a shared-memory kernel for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    backend = get_accelerator().communication_backend_name()
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    except torch.distributed.DistError as error:
        raise ValueError(_not_all_came(str(error), timeout)) from error
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < get_accelerator().device_count():  # else it is told by sorsa_ds.train.preflight, for all ranks
        get_accelerator().set_device(local_rank)


def _not_all_came(told: str, timeout: timedelta) -> str:
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    came = re.search(r"(\d+)/\d+ clients joined", told)  # only rank 0 counts
    if came:
        how_many = f"{came[1]} of {world} ranks came to {master}"
    elif "connect" in told:
        how_many = f"rank {rank} of {world} found nobody at {master}, where rank 0 listens"
    else:
        how_many = f"rank {rank} of {world} waited in vain for the others at {master}"
    return (
        f"node {os.uname().nodename}: {how_many}, within {timeout.total_seconds():g} s (train.timeout_minutes). Look "
        "whether every node has started its launcher, with its own node rank, the same number of nodes and the same "
        "master address and port; whether that address is the first node's and no firewall is between; and whether "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME has to name the network"
    )


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
