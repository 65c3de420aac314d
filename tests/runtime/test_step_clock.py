"""The clock of a step: it measures the parts that were entered, all visits together, and nothing while it is off."""

import time

import pytest
import torch

from sorsa_ds.runtime.step_clock import StepClock


def visit(clock: StepClock) -> None:
    """Enter parts and leave them, with known pauses."""
    time.sleep(0.01)
    for pause in (0.02, 0.03):
        clock.enter("forward")
        time.sleep(pause)
        clock.enter("backward")
        time.sleep(0.01)
    clock.leave()
    time.sleep(0.04)


def test_parts_last_as_long_as_they_were_entered():
    clock = StepClock(torch.device("cpu"))
    clock.start()
    visit(clock)
    assert clock.read() == {
        "forward": pytest.approx(0.05, abs=0.009), "backward": pytest.approx(0.02, abs=0.009)
    }  # fmt: skip


def test_a_clock_that_is_not_started_measures_nothing():
    clock = StepClock(torch.device("cpu"))
    visit(clock)
    assert clock.read() == {}
    clock.start()
    assert clock.read() == {}
    visit(clock)
    assert clock.read() == {}


def test_on_a_gpu_events_are_recorded_and_read_late(monkeypatch):
    """No GPU is needed: an event stands in that counts milliseconds, and tells what was asked of it."""
    asked = []

    class Event:
        now = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")
            Event.now += 5
            self.at = Event.now

        def elapsed_time(self, other):
            asked.append("elapsed_time")
            return other.at - self.at

        def synchronize(self):
            raise AssertionError("the host waits")

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda *_: pytest.fail("the host waits"))
    clock = StepClock(torch.device("cuda"))
    clock.start()
    visit(clock)
    assert asked == ["record"] * 5
    assert clock.read() == {"forward": pytest.approx(0.01), "backward": pytest.approx(0.01)}
