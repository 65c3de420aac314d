"""Experiment trackers: what a run logs goes to them as well, through accelerate's classes, in threads of their own.

Training never waits for a tracker: it puts what there is into a queue, and a thread hands it on. A tracker that fails
on the way is told of once and gets nothing more. Beginning in a thread also keeps trackers from taking the signals of
this process, which Python allows to its main thread alone. Only rank 0 has trackers.
"""

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.watch_settings import TrackerName
from sorsa_ds.config.yaml_io import flat, value_text
from sorsa_ds.run.paths import TRACKERS
from sorsa_ds.run.samples import Sample
from sorsa_ds.run.tracker_kinds import KINDS, Introduction, Rows, check_installed
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.files import write_json
from sorsa_ds.runtime.json_text import read_json

Work = Callable[[Any], None]
"""Something to be done with one of accelerate's trackers, in its thread."""

SECONDS_TO_BEGIN, SECONDS_TO_END, SECONDS_WHEN_STOPPED = 120.0, 120.0, 15.0
"""How long a run waits for all its trackers together: at its start, at its end, and where it was told to stop or has
failed."""
MOST_WAITING = 10_000
"""Entries that may wait for a tracker; where there are more, it is too slow or does not answer."""


class Trackers:
    """All trackers of one run, begun.

    Args:
        folder: the run's.
        config: the settings as resolved, which the trackers get as hyper-parameters when they first see the run.
        continues: the run was logged before.

    Raises:
        ValueError: a tracker is not installed, or refuses or cannot reach its server; the message names the way out.
    """

    def __init__(self, folder: Path, config: RunConfig, continues: bool):
        self._threads: list[TrackerThread] = []
        names = config.output.all_trackers
        check_installed(names)
        if not names:
            return
        known = _known_ids(folder) if continues else {}
        ids = dict(known)
        begun: dict[TrackerName, TrackerThread] = {}  # all of them begin at once
        for name in names:
            before = known.get(name)
            if before is None and continues and name == "wandb" and (folder / "wandb").exists():
                before = _plain(folder.name)  # earlier versions named a run on Weights & Biases after its folder
            run = Introduction(
                folder=folder,
                project=config.output.wandb_project,
                mode=config.output.wandb_mode,
                id=before or secrets.token_hex(16),
                continues=before is not None,
            )
            begun[name] = TrackerThread(name, partial(_begun, name, run, config))
        until = time.monotonic() + SECONDS_TO_BEGIN
        for name, thread in begun.items():
            try:
                ids[name] = thread.wait_until_begun(until)
            except Exception as error:  # their clients, the network and the servers fail in many ways
                raise ValueError(_refused(name, config.output.wandb_mode, error)) from error
            self._threads.append(thread)
        write_json(folder / TRACKERS, ids)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand numbers on that were measured after a step."""
        for thread in self._threads:
            thread.give(lambda tracker: tracker.log(values, step=step))

    def tell(self, step: int, samples: Sequence[Sample]) -> None:
        """Hand answers on that were given after a step, to the trackers that have a place for texts."""
        rows = [(step, one.prompt, one.expected, one.answer) for one in samples]
        for thread in self._threads:
            if (tell := KINDS[thread.name].tell) is not None:
                thread.give(_telling(tell, rows, step))

    def close(self, report: dict | None) -> None:
        """End all of them; they have some time, all together, to send what still waits.

        Args:
            report: the report of a run that came to its end; None: the run was stopped.
        """
        for thread in self._threads:
            thread.give(partial(_finish, thread.name, report))
        seconds = SECONDS_WHEN_STOPPED if report is None else SECONDS_TO_END
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.end(until, seconds)


class TrackerThread:
    """A thread that owns one tracker.

    Args:
        begin: makes the tracker and returns it with the id by which it knows the run.
    """

    def __init__(self, name: TrackerName, begin: Callable[[], tuple[Any, str]]):
        self.name = name
        self._waiting: queue.Queue[Work | None] = queue.Queue(MOST_WAITING)
        self._begun: Future[str] = Future()
        self._failed, self._once = False, threading.Lock()
        # A daemon: where the tracker does not answer, the process ends all the same.
        self._thread = threading.Thread(target=self._live, args=(begin,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def wait_until_begun(self, until: float) -> str:
        """Wait until the tracker has begun; returns the id by which it knows the run.

        Args:
            until: the latest moment, SECONDS_TO_BEGIN after all trackers were begun, in seconds of the monotonic clock.

        Raises:
            TimeoutError: the tracker has not begun by `until`.
            Exception: what the tracker raises.
        """
        try:
            return self._begun.result(_left(until))
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {SECONDS_TO_BEGIN:.0f} s") from error

    def give(self, work: Work) -> None:
        """Put work into the queue. Nothing happens where the tracker has failed."""
        if self._failed:
            return
        try:
            self._waiting.put_nowait(work)
        except queue.Full:
            self._give_up(f"{MOST_WAITING} entries wait for it")

    def end(self, until: float, seconds: float) -> None:
        """Wait until everything is handed on, but no longer than until a moment, in seconds of the monotonic clock.

        Args:
            seconds: the seconds that all trackers were given until that moment, for the message.
        """
        self._give_end()
        self._thread.join(_left(until))
        if self._thread.is_alive():
            self._give_up(f"it has not taken everything within {seconds:.0f} s of the run's end")

    def _give_end(self) -> None:
        """Let the thread end after the work that waits."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._give_up(f"{MOST_WAITING} entries wait for it")

    def _live(self, begin: Callable[[], tuple[Any, str]]) -> None:
        try:
            tracker, known_as = begin()
        except BaseException as error:  # some clients leave by SystemExit where a key is missing
            self._begun.set_exception(error if isinstance(error, Exception) else RuntimeError(f"it ends: {error}"))
            return
        self._begun.set_result(known_as)
        while (work := self._waiting.get()) is not None:
            if self._failed:
                continue
            try:
                work(tracker)
            except BaseException as error:
                self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        with self._once:
            if self._failed:
                return
            self._failed = True
        note(f"output.trackers: {self.name} gets nothing more of this run, which goes on: {why}")


def _left(until: float) -> float:
    """The seconds that are left until a moment of the monotonic clock; 0 where it has passed."""
    return max(0.0, until - time.monotonic())


def _begun(name: TrackerName, run: Introduction, config: RunConfig) -> tuple[Any, str]:
    """One of accelerate's trackers, begun, and the id by which it knows the run."""
    from accelerate import tracking

    tracking.logger = _Notices(logging.getLogger(tracking.__name__))  # type: ignore[assignment]
    kind = KINDS[name]
    tracker = tracking.LOGGER_TYPE_TO_CLASS[name](**kind.arguments(run))
    tracker.main_process_only = False  # only this process has it; accelerate would ask its own state of processes
    tracker.start()
    if not run.continues:
        tracker.store_init_configuration(hyper_parameters(config, nested=name == "wandb"))
    return tracker, run.id if kind.own_id is None else kind.own_id(tracker)


def _telling(tell: Callable[[Any, Rows, int], None], rows: Rows, step: int) -> Work:
    return lambda tracker: tell(tracker, rows, step)


def _finish(name: TrackerName, report: dict | None, tracker: Any) -> None:
    if name != "wandb":
        tracker.finish()
        return
    tracker.tracker.summary.update(report or {})
    tracker.tracker.finish(exit_code=0 if report else 1)


class _Notices(logging.LoggerAdapter):
    """What accelerate's trackers say of themselves, without its own logger.

    That one wants accelerate's state of processes, whose making sets threads and devices.
    """

    def warning_once(self, message: str, *args: Any) -> None:
        """Take what accelerate would say once, for whoever listens at the level of debugging."""
        self.debug(message, *args)


def hyper_parameters(config: RunConfig, nested: bool) -> dict[str, Any]:
    """The settings as trackers take them.

    Args:
        nested: whether they are nested dictionaries; else by dotted path, with numbers, texts and truth values alone.
    """
    if nested:
        return asdict(config)
    settings = flat(asdict(config), schema=RunConfig)
    return {
        name: one if isinstance(one, bool | int | float | str) else value_text(one) for name, one in settings.items()
    }


def _known_ids(folder: Path) -> dict[str, str]:
    """By which ids trackers know a run; empty where no file says it.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / TRACKERS
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ValueError(f"{path} is damaged: names and ids are expected; remove it, and trackers see a new run")
    return found


def _plain(name: str) -> str:
    """A name with letters, digits, - and _ alone."""
    return "".join(sign if (sign.isalnum() and sign.isascii()) or sign in "-_" else "-" for sign in name)


def _refused(name: TrackerName, mode: str, error: Exception) -> str:
    """Why a tracker has not begun, and what else can be done."""
    if name != "wandb":
        return f"output.trackers: {name} cannot begin: {error}; without it the run would log to the others"
    return (
        f"output.wandb={mode}: {error}\noutput.wandb=offline writes local files, which `wandb sync` uploads later; "
        f"without wandb in output.wandb and output.trackers it is left out"
    )
