"""What a run writes down of itself while it trains; by rank 0 alone."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal, TextIO

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.folder import write_settings
from sorsa_ds.run.metrics import is_asked_again, is_evaluated_again, is_kept, read_metrics
from sorsa_ds.run.paths import ENDED, INIT, METRICS, REPORT, SAMPLES
from sorsa_ds.run.samples import Sample, read_samples
from sorsa_ds.run.trackers import Trackers
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.files import write_json, write_text
from sorsa_ds.runtime.json_text import finite_json


class RunLog:
    """Metrics to metrics.jsonl, answers to samples.jsonl, both to trackers. On ranks other than 0 it does nothing.

    Args:
        folder: the run's.
        config: the settings as resolved.
        ds_config: the DeepSpeed JSON as resolved.
        given: the DeepSpeed JSON as it was given.
        initialised: what init.json will hold; None where a run is continued, whose file stays.
        steps_done: finished steps of the run. Lines of later steps, which a run that was killed has left, are removed,
            and so are the evaluation and the answers after that step, where they are made again.
        steps: the number of steps of the whole run.
        trackers: begun on rank 0, before anything in the folder of a run that goes on is changed; None on the others.

    Raises:
        ValueError: a file of the folder cannot be written, or what is in it is damaged; on rank 0 alone.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: RunConfig,
        ds_config: dict,
        given: dict,
        initialised: dict | None,
        steps_done: int,
        steps: int,
        trackers: Trackers | None,
    ):
        self.folder = folder
        self._file: TextIO | None = None
        self._trackers = trackers
        if trackers is None:
            return
        write_settings(folder, config, ds_config, given)  # a run that goes on may have others than before
        if initialised is not None:
            write_json(folder / INIT, initialised)
        every, new = config.train.eval_every, initialised is not None
        measured = new or is_evaluated_again(steps_done, every, steps)
        answered = new or is_asked_again(
            steps_done, every, config.evaluation.samples_every if config.evaluation.samples else 0, steps
        )
        write_text(folder / METRICS, _lines([x for x in read_metrics(folder) if is_kept(x, steps_done, measured)]))
        if (folder / SAMPLES).exists():
            write_text(folder / SAMPLES, _lines([x for x in read_samples(folder) if is_kept(x, steps_done, answered)]))
        with suppress(OSError):
            (folder / ENDED).unlink(missing_ok=True)
        self._file = (folder / METRICS).open("a", encoding="utf-8")

    def write(self, step: int, **values: float | None) -> None:
        """Log one line; `step` is the number of finished optimizer steps. Values that are None are left out.

        Raises:
            ValueError: a value is NaN or infinite; the message names it and the step.
        """
        if self._file is None or self._trackers is None:
            return
        measured = {key: value for key, value in values.items() if value is not None}
        try:
            line = finite_json({"step": step, **measured})
        except ValueError as error:
            raise ValueError(f"{self.folder / METRICS}: step {step} is not logged: {error}") from error
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            note(f"{self.folder / METRICS}: step {step} is not logged ({error.strerror})")
        self._trackers.log(step, measured)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Log answers that the model has given after `step` finished steps. Closed trackers get nothing of them."""
        if self._trackers is None:
            return
        try:
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(_lines([{"step": step, **asdict(one)} for one in samples]))
        except OSError as error:
            note(f"{self.folder / SAMPLES}: the answers of step {step} are not logged ({error.strerror})")
        if self._file is not None:  # else the trackers have ended
            self._trackers.tell(step, samples)

    def losses(self) -> list[float]:
        """The training losses logged so far."""
        return [line["loss"] for line in read_metrics(self.folder) if "loss" in line] if self._file else []

    def write_report(self, report: dict) -> None:
        """Write the report of a run that came to its end.

        Raises:
            ValueError: the report cannot be written.
        """
        if self._file is not None:
            write_json(self.folder / REPORT, report, parents=False)

    def write_end(self, state: Literal["failed", "interrupted"], step: int, why: str) -> None:
        """Write down why the run ends before its last step; a disk that refuses is passed over."""
        if self._file is not None:
            with suppress(ValueError):
                write_json(self.folder / ENDED, {"state": state, "step": step, "why": why}, parents=False)

    def close(self, report: dict | None) -> None:
        """End the logs. A run that came to its end gives its report."""
        if self._file is None or self._trackers is None:
            return
        with suppress(OSError):  # the disk may still refuse a line that was not logged
            self._file.close()
        self._file = None
        self._trackers.close(report)


def _lines(found: Sequence[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in found)
