"""The clock of a step: it measures the parts that were entered, all visits together, and nothing while it is off."""

import time

import pytest
import torch

from sorsa_ds.runtime.step_clock import StepClock


@pytest.fixture(autouse=True)
def sleep(monkeypatch):
    """Time that passes only when somebody sleeps: a busy machine would add to it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return sleep


def visit(clock: StepClock, sleep) -> None:
    """Enter parts and leave them, with known pauses."""
    sleep(0.01)
    for pause in (0.02, 0.03):
        clock.enter("forward")
        sleep(pause)
        clock.enter("backward")
        sleep(0.01)
    clock.leave()
    sleep(0.04)


def test_parts_last_as_long_as_they_were_entered(sleep):
    clock = StepClock(torch.device("cpu"))
    clock.start()
    visit(clock, sleep)
    assert clock.read() == {"forward": pytest.approx(0.05), "backward": pytest.approx(0.02)}


def test_a_clock_that_is_not_started_measures_nothing(sleep):
    clock = StepClock(torch.device("cpu"))
    visit(clock, sleep)
    assert clock.read() == {}
    clock.start()
    assert clock.read() == {}
    visit(clock, sleep)
    assert clock.read() == {}


def test_on_a_gpu_events_are_recorded_and_read_late(monkeypatch, sleep):
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
    visit(clock, sleep)
    assert asked == ["record"] * 5
    assert clock.read() == {"forward": pytest.approx(0.01), "backward": pytest.approx(0.01)}
