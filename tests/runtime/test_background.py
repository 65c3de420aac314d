"""Work in other threads: its result, its mistakes, and the GPU that it takes."""

import pytest
import torch

from sorsa_ds.runtime.background import in_background, on_this_device


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
