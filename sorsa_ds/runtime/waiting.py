"""Long work that one rank does for others: they wait on the job's store, and not in a collective with its time-out.

Hashing 140 GB from a slow disk, or downloading a model, takes longer than ranks may wait for each other
(`train.timeout_minutes`). While the work is done, the rank that does it shows every few seconds that it lives; the
others give up only when it no longer does.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.errors import PeerError

BEAT_SECONDS, SILENT_SECONDS, TELL_SECONDS = 5.0, 120.0, 30.0
"""Seconds from one sign of life to the next, without one until the others give up, and between two progress lines."""

_number = 0
"""How many pieces of work there were; all ranks count alike, since every call is collective."""


def first_of_job(action: Callable[[], Any], what: str) -> Any:
    """Rank 0 runs the action, the others wait. A collective call.

    Args:
        action: returns what JSON can hold.
        what: names the work in the progress line, as in `hashing the weights`.

    Returns:
        The action's result, on every rank.

    Raises:
        Exception: the action's own error, on rank 0.
        PeerError: on the others, with rank 0's message, or because it is gone.
    """
    return _first(action, what, "job", collectives.rank() == 0)


def first_of_node(action: Callable[[], Any], what: str) -> Any:
    """The first rank of each node runs the action, the others of the node wait. A collective call.

    It takes, returns and raises the same as `first_of_job`, for each node by itself.
    """
    launcher = os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK", "0"))
    return _first(action, what, f"{os.uname().nodename}/{launcher}", os.environ.get("LOCAL_RANK", "0") == "0")


def _first(action: Callable[[], Any], what: str, group: str, works: bool) -> Any:
    global _number
    if collectives.world_size() == 1:
        return action()
    _number += 1
    store = dist.distributed_c10d._get_default_store()
    key = f"sorsa_ds/waiting/{_number}/{group}"
    return _work(store, key, action, what) if works else _wait(store, key, what)


def _work(store: dist.Store, key: str, action: Callable[[], Any], what: str) -> Any:
    """Run the action beside a thread that shows signs of life, and leave the result or the error in the store."""
    done, began = threading.Event(), time.monotonic()

    def live() -> None:
        told = began
        while not done.wait(BEAT_SECONDS):
            store.add(f"{key}/beats", 1)
            if (now := time.monotonic()) - told > TELL_SECONDS:
                told = now
                say(f"still {what}: {timedelta(seconds=round(now - began))}")

    beats = threading.Thread(target=live, daemon=True)
    beats.start()
    answer: dict[str, Any] = {"error": "interrupted"}
    try:
        answer = {"result": action()}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        done.set()
        beats.join()
        store.set(key, json.dumps(answer))
    return answer["result"]


def _wait(store: dist.Store, key: str, what: str) -> Any:
    """Wait for the result in the store as long as there are signs of life."""
    began = seen = time.monotonic()
    beats = 0
    while not store.check([key]):
        time.sleep(0.1 if time.monotonic() - began < 5 else 1.0)
        if (found := store.add(f"{key}/beats", 0)) != beats:
            beats, seen = found, time.monotonic()
        if time.monotonic() - seen > SILENT_SECONDS:
            raise PeerError(
                f"stopped because the rank that was {what} has shown no sign of life for {SILENT_SECONDS:.0f} s"
            )
    answer = json.loads(store.get(key))
    if "error" in answer:
        raise PeerError(f"stopped because another rank failed: {answer['error']}")
    return answer["result"]
