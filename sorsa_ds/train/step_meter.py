"""What a step's line in the log says of its speed, and where asked for, how its time divides among its parts."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sorsa_ds.config.train_settings import TrainConfig
from sorsa_ds.plan.utilisation import Utilisation
from sorsa_ds.run.paths import PROFILE
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note, say
from sorsa_ds.runtime.files import write_atomic
from sorsa_ds.runtime.process import memory_gib
from sorsa_ds.runtime.step_clock import StepClock
from sorsa_ds.train.ready_step import ReadyStep

WARM_UP = 3
"""Steps of a job before the first one that is profiled: they allocate, and choose kernels."""


class StepMeter:
    """Measures the steps of a job. Parts and traces are rank 0's; the other ranks measure nothing but a step's seconds.

    Args:
        train: the settings.
        utilisation: what MFU is computed from.
        clock: the one that the engine and the trainer tell of the parts.
        folder: the run's.
        first: the first step of this job, from 0.
        steps: the number of steps of the whole run.
    """

    def __init__(
        self, train: TrainConfig, utilisation: Utilisation, clock: StepClock, folder: Path, first: int, steps: int
    ):
        self._utilisation, self._clock, self._folder = utilisation, clock, folder
        self._trace = train.profile_trace
        self._on_gpu = clock.device.type == "cuda"
        begin = min(first + WARM_UP, steps)
        self._profiled = range(begin, min(begin + train.profile_steps, steps))
        self._seconds = 0.0
        self._parts: dict[str, float] = {}
        self._traced: list[int] = []
        if train.profile_steps:
            say(self._intention(train.profile_steps))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context that makes an optimizer step, number `number` from 0, and measures it."""
        self._parts = {}
        if number not in self._profiled or collectives.rank() != 0:
            tick = time.perf_counter()
            yield
            self._seconds = time.perf_counter() - tick
            return
        recorder = self._recorder()
        recorder.start()
        try:
            tick = time.perf_counter()
            self._clock.start()
            yield
            self._seconds = time.perf_counter() - tick
        finally:
            recorder.stop()  # it waits for a GPU, so that the clock can be read
            parts = self._clock.read()
        rest = max(0.0, self._seconds - sum(parts.values()))
        self._parts = {**parts, "rest": rest, "collectives": self._collectives(recorder)}
        if self._trace:
            self._write(recorder, number + 1)
        if number == self._profiled[-1]:
            self._tell()

    def figures(self, ready: ReadyStep) -> dict[str, float | None]:
        """What the log says of the last step: tokens per second, MFU, memory, and the seconds of its parts.

        Args:
            ready: what the step has computed.
        """
        speed = ready.tokens / self._seconds
        parts = {f"step_seconds/{part}": seconds for part, seconds in self._parts.items()}
        return {
            "tokens_per_second": speed,
            "tokens_per_second_per_gpu": speed / collectives.world_size(),
            "mfu": self._utilisation.mfu(ready.tokens, ready.learned, ready.squares, self._seconds),
            "memory_gib": memory_gib(),
            **({"step_seconds": self._seconds, **parts} if parts else {}),
        }

    def _recorder(self) -> profile:
        """PyTorch's profiler of as little as is needed: kernels of a GPU, or operators, for a trace both."""
        activities = [ProfilerActivity.CUDA] if self._on_gpu else []
        if self._trace or not self._on_gpu:
            activities.append(ProfilerActivity.CPU)
        return profile(activities=activities)

    def _collectives(self, recorder: profile) -> float:
        """Seconds in which a collective was under way: a kernel of NCCL on a GPU, an operation of gloo on a CPU."""
        kind, sign = (DeviceType.CUDA, "nccl") if self._on_gpu else (DeviceType.CPU, "gloo:")
        return covered(
            (event.time_range.start / 1e6, event.time_range.end / 1e6)
            for event in recorder.events() or ()
            if event.device_type == kind and event.name.startswith(sign)
        )

    def _write(self, recorder: profile, step: int) -> None:
        """Write the trace of a step; where the disk refuses, say so and go on."""
        try:
            write_atomic(self._trace_file(step), lambda file: recorder.export_chrome_trace(str(file)))
        except ValueError as error:
            note(f"step {step} has no trace: {error}")
        else:
            self._traced.append(step)

    def _trace_file(self, step: int) -> Path:
        return self._folder / PROFILE / f"step-{step:06d}.rank-0.json.gz"

    def _intention(self, asked: int) -> str:
        """Which steps will be profiled, and how many of those that were asked for will not."""
        count = len(self._profiled)
        short = (
            "" if count == asked else f", {count} instead of {asked}: the run has no more after {WARM_UP} of warm-up"
        )
        if not count:
            return f"Profile: no step{short}."
        first, last = self._profiled[0] + 1, self._profiled[-1] + 1
        traced = ", with Chrome traces, which make them slower" if self._trace else ""
        return f"Profile: steps {first} to {last}{traced}{short}."

    def _tell(self) -> None:
        """Say that the profile is complete, and where it is."""
        say(f"The parts of the profiled steps' time are in metrics.jsonl, up to step {self._profiled[-1] + 1}.")
        if self._traced:
            size = sum(self._trace_file(step).stat().st_size for step in self._traced) / 2**20
            say(f"{len(self._traced)} traces ({size:.1f} MiB) in {self._folder / PROFILE}, for https://ui.perfetto.dev")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long any of the spans (begin, end) lasted; where several overlap, that time counts once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
