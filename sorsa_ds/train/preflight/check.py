"""The exchange between the ranks: the facts of all ranks, a file in the run folder, a timed all-reduce with a limit."""

import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.files import write_text
from sorsa_ds.train.first_checks import check_own_node, on_one_node
from sorsa_ds.train.options import Invocation
from sorsa_ds.train.preflight.faults import faults, rank_map, ranks_by_node
from sorsa_ds.train.preflight.rank_facts import gather_facts, runs_folder

T = TypeVar("T")
_NUMBERS = 2**22
"""fp32 numbers of the all-reduce: enough to tell a fast network from a slow one, 16 MiB."""
_LONGEST = timedelta(minutes=2)


def check_job(
    invocation: Invocation, ds_config: dict, device: torch.device, timeout: timedelta, argv: list[str]
) -> None:
    """Print the map of the ranks and go on, or stop on every rank with everything that is wrong. A collective call.

    Args:
        ds_config: the DeepSpeed JSON as it was read.
        device: where this rank computes.
        timeout: of the process group; the all-reduce has at most two minutes of it.
        argv: the command line without the program.

    Raises:
        ValueError: naming the nodes and what is wrong there; the same on every rank.
    """
    group = collectives.cpu_group(timeout)  # a network that only the GPUs use may be what is broken
    node = os.uname().nodename
    mine, wrong = None, None
    try:
        if not on_one_node():
            check_own_node(invocation)
        mine = gather_facts(invocation, ds_config, argv)
    except ValueError as error:
        wrong = f"node {node}: {error}"
    except Exception as error:  # the others wait for this rank
        wrong = f"node {node} (rank {collectives.rank()}): {type(error).__name__}: {error}"
    _stop_on(_from_all(wrong, group))
    assert mine is not None
    facts = _from_all(mine, group)
    say(rank_map(facts))
    _stop_on(faults(facts))
    if len(ranks_by_node(facts)) > 1:
        _stop_on(_folder_faults(runs_folder(invocation), node, group))
    if collectives.world_size() > 1:
        seconds, wrong = _all_reduce(device, min(timeout, _LONGEST))
        _stop_on(_from_all(f"node {node}: {wrong}" if wrong else None, group))
        say(f"  all-reduce of {_NUMBERS * 4 / 2**20:.0f} MiB over all ranks: {seconds * 1e3:.0f} ms")


def _stop_on(found: Iterable[str | None]) -> None:
    """Stop if any rank found a fault; print each distinct fault once."""
    if found := list(dict.fromkeys(fault for fault in found if fault)):
        raise ValueError("preflight: nothing was started:\n  " + "\n  ".join(found))


def _from_all(mine: T, group: dist.ProcessGroup | None) -> list[T]:
    """What every rank has to tell, in rank order. A collective call."""
    if collectives.world_size() == 1:
        return [mine]
    told: list = [None] * collectives.world_size()
    dist.all_gather_object(told, mine, group=group)
    return told


def _folder_faults(folder: Path, node: str, group: dist.ProcessGroup | None) -> list[str | None]:
    """What is wrong with the run's folder: every rank writes into it, so it must be the same one on every node.

    A collective call.
    """
    written = folder / f".preflight-{uuid.uuid4().hex}"
    wrong = None
    if collectives.rank() == 0:
        try:
            write_text(written, "")
        except ValueError as error:
            wrong = f"node {node}: {error}"
    name = _from_all(written.name, group)[0]
    refused: list[str | None] = [fault for fault in _from_all(wrong, group) if fault]
    if not refused and not os.path.exists(folder / name):  # nor where it may not look
        wrong = f"node {node}: output.folder {folder} is not that of rank 0: all nodes need one shared folder"
    found = refused or _from_all(wrong, group)
    with suppress(OSError):
        written.unlink(missing_ok=True)
    return found


def _all_reduce(device: torch.device, limit: timedelta) -> tuple[float, str | None]:
    """Sum ones over all ranks, twice, because the first time sets up connections. A collective call.

    Returns:
        (seconds of the second time, what is wrong or None).
    """
    ones, seconds = torch.empty(_NUMBERS, device=device), 0.0
    try:
        for _ in range(2):
            ones.fill_(1)
            began = time.perf_counter()
            dist.all_reduce(ones, async_op=True).wait(limit)
            total = ones[-1].item()
            seconds = time.perf_counter() - began
    except RuntimeError as error:
        return seconds, (
            f"an all-reduce over {dist.get_backend()} fails within {limit.total_seconds():g} s ({error}); "
            f"{dist.get_backend().upper()}_SOCKET_IFNAME may have to name the network"
        )
    right = total == collectives.world_size()
    return seconds, None if right else f"an all-reduce of ones over {collectives.world_size()} ranks gives {total:g}"
