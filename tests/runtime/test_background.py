"""Work in other threads: its result, its mistakes, and the GPU that it takes."""

import time
from datetime import timedelta

import pytest
import torch

from sorsa_ds.runtime.background import in_background, on_this_device, patiently
from tests.helpers.worlds import run_ranks


def test_a_result_and_a_mistake_reach_the_caller():
    assert in_background(lambda: 3, "three").result() == 3
    with pytest.raises(ValueError, match="no"):
        in_background(lambda: int("no"), "a mistake").result()


def test_a_thread_has_its_callers_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    act = on_this_device(lambda: chosen.append("act"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # as in a new thread
    act()
    in_background(lambda: None, "nothing").result()
    assert chosen == [5, "act", 0]


def test_without_cuda_nothing_asks_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("asked"))
    assert on_this_device(lambda: 1)() == 1


def test_ranks_wait_for_rank_0_longer_than_a_collective_may_take():
    assert run_ranks(2, waited, timeout=60) == ["done", None]


def waited():
    """What this rank gets of work that takes three times as long as a collective may."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    return patiently(lambda: time.sleep(6) or "done", torch.device("cpu"))


def test_a_mistake_of_rank_0_stops_all_of_them():
    told = run_ranks(2, mistaken, timeout=60)
    assert told[0] == "ValueError: full"
    assert told[1].startswith("PeerError") and "rank 0: ValueError: full" in told[1]


def mistaken():
    def fail():
        raise ValueError("full")

    try:
        patiently(fail, torch.device("cpu"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
