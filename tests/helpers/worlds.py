"""Real process groups inside pytest: run a function on N ranks over gloo, and get every rank's result or its error."""

import functools
import gc
import io
import multiprocessing
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from sorsa_ds.runtime.call_stack import call_with_room
from sorsa_ds.runtime.ports import free_port

FORK = multiprocessing.get_context("fork")


def run_ranks(
    world_size: int, function: Callable, *args: Any, timeout: float = 300.0, start: str = "fork"
) -> list[Any]:
    """Call `function(*args)` in `world_size` processes with an initialised DeepSpeed process group.

    start: `fork` is quick. `spawn` is for a GPU, whose driver does not survive a fork once a library has started it.

    Returns each rank's result, in rank order. The first rank that fails fails the test with its traceback; all
    processes are gone afterwards.
    """
    if start == "fork":
        import_once()
    context = multiprocessing.get_context(start)
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world_size:
            try:
                rank, ok, value = results.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"ranks {set(range(world_size)) - set(collected)} hang after {timeout} s") from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            collected[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [collected[rank] for rank in range(world_size)]


@functools.cache
def import_once() -> None:
    """Import here, before forking, what each rank would import for itself: seconds of a core for every rank.

    Not where there is a GPU: some of it starts CUDA, and a process that has started CUDA must not fork.
    """
    if not torch.cuda.is_available():
        import deepspeed.moe.layer
        import deepspeed.ops
        import peft  # noqa: F401

        import sorsa_ds.train.setup  # noqa: F401

        _ = deepspeed.ops.__compatible_ops__  # runs compilers, to see which of its kernels could be built
        gc.freeze()


def told_by_launcher(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables of a rank on this machine, as DeepSpeed's launcher sets them.

    Without LOCAL_SIZE DeepSpeed would start `numactl` in every step, to count a CPU's devices.
    """
    here = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(world_size))
    return {**here, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _rank(rank: int, world_size: int, port: int, results, function: Callable, args: tuple) -> None:
    try:
        sys.settrace(None)  # a rank ends without saying which lines it ran: measuring them would only take time
        torch.set_num_threads(1)
        # tqdm's own lock is shared with the process that was forked: a rank that is killed while it holds it, at the
        # end of a test or in the middle, would stop every later progress bar.
        tqdm.set_lock(threading.RLock())
        os.environ.update(told_by_launcher(rank, world_size, port))
        from sorsa_ds.runtime.process import init_distributed

        init_distributed()
        gc.freeze()  # DeepSpeed collects garbage all the time: it need not look through what is here to stay
        value = call_with_room(function, *args)  # as commands do
        torch.distributed.barrier()
        # As bytes: a tensor in a queue is a file descriptor that dies with its process.
        stored = io.BytesIO()
        torch.save(value, stored)
        results.put((rank, True, stored.getvalue()))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
