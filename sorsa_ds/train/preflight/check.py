"""The exchange between the ranks: the facts of all ranks, a file in the run folder, a timed all-reduce with a limit."""

import os
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.files import write_text
from sorsa_ds.train.first_checks import check_own_node, on_one_node
from sorsa_ds.train.options import Invocation
from sorsa_ds.train.preflight.faults import faults, rank_map, ranks_by_node
from sorsa_ds.train.preflight.rank_facts import RankFacts, gather_facts, runs_folder

_NUMBERS = 2**22
"""fp32 numbers of the all-reduce: enough to tell a fast network from a slow one, 16 MiB."""
_LONGEST, _GRACE_SECONDS = timedelta(minutes=2), 5.0
_FAILED = "sorsa_ds/preflight/failed"


def check_job(
    invocation: Invocation, ds_config: dict, device: torch.device, timeout: timedelta, argv: list[str]
) -> None:
    """Print the map of the ranks and go on, or stop on every rank with everything that is wrong. A collective call.

    Args:
        ds_config: the DeepSpeed JSON as it was read.
        device: where this rank computes.
        timeout: the process group's timeout; the all-reduce has at most two minutes of it.
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
    _stop_on(collectives.gather_json(wrong, group))
    assert mine is not None
    facts = [RankFacts(**told) for told in collectives.gather_json(asdict(mine), group)]
    say(rank_map(facts))
    _stop_on(faults(facts))
    if len(ranks_by_node(facts)) > 1:
        _stop_on(_folder_faults(runs_folder(invocation), node, group))
    if collectives.world_size() > 1:
        seconds, wrong = _all_reduce(device, min(timeout, _LONGEST))
        _stop_on(collectives.gather_json(f"node {node}: {wrong}" if wrong else None, group))
        say(f"  all-reduce of {_NUMBERS * 4 / 2**20:.0f} MiB over all ranks: {seconds * 1e3:.0f} ms")


def _stop_on(found: Iterable[str | None]) -> None:
    """Stop if any rank found a fault; print each distinct fault once."""
    if found := list(dict.fromkeys(fault for fault in found if fault)):
        raise ValueError("preflight: nothing was started:\n  " + "\n  ".join(found))


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
    name = collectives.gather_json(written.name, group)[0]
    refused: list[str | None] = [fault for fault in collectives.gather_json(wrong, group) if fault]
    if not refused and not os.path.exists(folder / name):  # nor where it may not look
        wrong = f"node {node}: output.folder {folder} is not that of rank 0: all nodes need one shared folder"
    found = refused or collectives.gather_json(wrong, group)
    with suppress(OSError):
        written.unlink(missing_ok=True)
    return found


def _all_reduce(device: torch.device, limit: timedelta) -> tuple[float, str | None]:
    """Sum ones over all ranks, twice, because the first time sets up connections. A collective call.

    On GPUs this is where NCCL connects, which may wait without end for a rank whose own NCCL has failed. So it runs in
    a thread, and the rank that fails says so in the store, where the others see it.

    Returns:
        (seconds of the second time, what is wrong or None).
    """
    store, backend = dist.distributed_c10d._get_default_store(), dist.get_backend()
    found: dict[str, float | str] = {}
    thread = threading.Thread(target=_sum_ones, args=(device, limit, found), daemon=True)
    thread.start()
    until = time.monotonic() + limit.total_seconds() + _GRACE_SECONDS  # the library's own words come first
    while thread.is_alive() and time.monotonic() < until and not store.check([_FAILED]):
        thread.join(0.1)
    if "wrong" in found:
        store.set(_FAILED, "yes")
        return 0.0, (
            f"an all-reduce over {backend} fails ({found['wrong']}); {backend.upper()}_SOCKET_IFNAME may have to name "
            f"the network, and NCCL_DEBUG=INFO tells more"
        )
    if "seconds" in found or store.check([_FAILED]):  # a rank that has failed tells why
        return float(found.get("seconds", 0.0)), None
    return 0.0, f"an all-reduce over {backend} does not end within {limit.total_seconds():g} s"


def _sum_ones(device: torch.device, limit: timedelta, found: dict[str, float | str]) -> None:
    """Fill in `seconds` of the second all-reduce, or what is `wrong`."""
    try:
        ones = torch.empty(_NUMBERS, device=device)
        for _ in range(2):
            ones.fill_(1)
            began = time.perf_counter()
            dist.all_reduce(ones, async_op=True).wait(limit)
            total = ones[-1].item()
            seconds = time.perf_counter() - began
    except RuntimeError as error:
        found["wrong"] = str(error)
        return
    if total == collectives.world_size():
        found["seconds"] = seconds
    else:
        found["wrong"] = f"the sum of ones over {collectives.world_size()} ranks is {total:g}"
