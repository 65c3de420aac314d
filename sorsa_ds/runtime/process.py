"""How this process becomes a rank: its process group, device and threads, and how much memory it takes."""

import os
import re
import resource
from datetime import timedelta

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from sorsa_ds.runtime import collectives, device, numerics, precision
from sorsa_ds.runtime.console import quiet_libraries
from sorsa_ds.runtime.precision import Device
from sorsa_ds.runtime.rank_variables import take_place


def start_process(timeout: timedelta = collectives.TIMEOUT) -> Device:
    """Prepare this process: quiet libraries, threads, numerics and the process group. A collective call.

    Returns:
        The type of the device on which it computes.

    Raises:
        ValueError: not all ranks have come within the timeout, or there is a GPU that torch cannot use.
    """
    quiet_libraries()
    device_type = device.device_type()
    if device_type == "cpu":
        precision.set_threads(local_ranks())
    numerics.set_numerics(device_type)
    init_distributed(timeout)
    return device_type


def local_ranks() -> int:
    """The number of ranks of this job on this machine, as the launcher says it; 1 if it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def ranks_of_each_node() -> int:
    """The number of ranks on every node; 0 where nodes differ or no launcher says it. A collective call."""
    said = collectives.world_size() == 1 or not {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"}.isdisjoint(os.environ)
    found = set(collectives.gather_lists([local_ranks() if said else 0]))
    return found.pop() if len(found) == 1 else 0


def init_distributed(timeout: timedelta = collectives.TIMEOUT) -> None:
    """Start the process group, also for a single process, without compiling extensions that the run does not need.

    The ranks meet at a TCP port of rank 0, into which every computer that reaches it can write. A single process opens
    no such port.

    Args:
        timeout: how long a rank waits for the others, here and in every collective afterwards.

    Raises:
        ValueError: the group cannot be made. The message says why: the port is taken, so many ranks have come in time,
            or what the library says.
    """
    if device.device_type() == "cpu":
        # The first collective on a CPU would otherwise compile a shared-memory kernel for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    take_place()
    backend = get_accelerator().communication_backend_name()
    try:
        if not torch.distributed.is_initialized():
            # DeepSpeed would name the GPU here, at which NCCL connects at once. It is to connect in the preflight,
            # where the ranks can still tell each other over gloo what NCCL says.
            if os.environ["WORLD_SIZE"] == "1":
                alone = torch.distributed.HashStore()
                torch.distributed.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
            else:
                torch.distributed.init_process_group(backend, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    except RuntimeError as error:
        raise ValueError(_not_joined(str(error), timeout)) from error
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < get_accelerator().device_count():  # else sorsa_ds.train.preflight reports it, for all ranks at once
        get_accelerator().set_device(local_rank)


def _not_joined(told: str, timeout: timedelta) -> str:
    """A message for a rank that could not join the others, from the words of torch's error."""
    node, rank, world = os.uname().nodename, os.environ["RANK"], os.environ["WORLD_SIZE"]
    port = os.environ["MASTER_PORT"]
    master = f"{os.environ['MASTER_ADDR']}:{port}"
    if "EADDRINUSE" in told:
        return (
            f"node {node}: port {port}, at which the ranks were to meet, is in use already, by another job perhaps: "
            f"choose another one (--master_port PORT; launch/multi_gpu.sh calls it --port) ({told})"
        )
    if not any(sign in told.lower() for sign in ("timed out", "timeout")):
        return f"node {node}: rank {rank} of {world} cannot join the others at {master}: {told}"
    came = re.search(r"(\d+)/\d+ clients joined", told)  # torch says it on rank 0 only
    if came:
        how_many = f"{came[1]} of {world} ranks came to {master}"
    elif "connect" in told:
        how_many = f"rank {rank} of {world} found nobody at {master}, where rank 0 listens"
    else:
        how_many = f"rank {rank} of {world} waited in vain for the others at {master}"
    return (
        f"node {node}: {how_many}, within {timeout.total_seconds():g} s (train.timeout_minutes). "
        "Check whether every node has started its launcher, with its own node rank, the same number of nodes and the "
        "same master address and port; whether that address is the first node's and no firewall is between them; and "
        f"whether GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME has to name the network interface ({told})"
    )


def memory_gib() -> float:
    """The peak GPU memory of this rank in GiB; where there is no GPU, its resident memory at this moment."""
    if device.device_type() == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def peak_resident_gib() -> float:
    """The largest resident memory that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory_gib() -> float:
    """The peak GPU memory of this rank in GiB; where there is no GPU, its largest resident memory so far."""
    return memory_gib() if device.device_type() == "cuda" else peak_resident_gib()
