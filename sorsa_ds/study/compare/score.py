"""The scores of a comparison's models, measured by launch/evaluate.py, which goes on where it was interrupted."""

import shlex
from dataclasses import dataclass
from typing import get_args

from sorsa_ds.evaluate.options import TaskName
from sorsa_ds.evaluate.records import RESULTS
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.json_text import read_json
from sorsa_ds.study.compare.runner import Runner

BASE = "base"
"""Name of the base model's folder of results."""

_FIGURES = {"loss": "perplexity", "drift": "kl"}
"""Task -> the entry of its results that is its score; all others have an accuracy."""
_BASE = "--base"
_TRUST = "--trust_remote_code"
"""The runs of a comparison whose own settings allow the model's code are evaluated with it too."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured. task: the option --task of launch/evaluate.py. options: its other options, as one string."""

    task: str
    options: str

    def __post_init__(self):
        scored = [name for name in get_args(TaskName) if name != "mt_bench"]  # whose score needs a judge
        if self.task not in scored:
            raise ValueError(f"--task: a comparison measures no {self.task!r}, but {', '.join(scored)}")
        try:
            words = shlex.split(self.options)
        except ValueError as error:
            raise ValueError(f"--task_options: {self.options!r} cannot be read: {error}") from error
        taken = [word for word in words if word.partition("=")[0] in ("--model", "--task", "--output")]
        if taken:
            raise ValueError(f"--task_options: {taken[0]} is set by the comparison")

    @property
    def score(self) -> str:
        """Name of the figure that is measured, with its unit."""
        return {"loss": "perplexity", "drift": "drift_nats"}.get(self.task, "accuracy_percent")

    @property
    def heading(self) -> str:
        """The beginning of the heading over the figure in a table."""
        return {"loss": "perplexity", "drift": "drift, nats per token,"}.get(self.task, f"{self.task}, %,")

    @property
    def form(self) -> str:
        """The format in which the figure is written."""
        return ".4f" if self.task == "drift" else ".2f"

    @property
    def of_every_rate(self) -> bool:
        """Whether runs at all learning rates are measured, and not those at their method's best one alone."""
        return self.task == "drift"

    def measure(self, model: str, name: str, runner: Runner) -> tuple[float | None, str | None]:
        """(the score of a model, None), or (None, why there is none).

        Args:
            model: a run's folder, or anything else that launch/evaluate.py takes.
            name: the name of the model's folder of results.

        Raises:
            Preempted: this process was told to stop; samples made so far are kept.
        """
        kind = f"{self.task}-{digest.of_bytes(self.options.encode())[:8]}"  # keeps results of other options apart
        folder = runner.output / "evaluations" / kind / name
        # It is launched even where results exist: the command sees whether they are this model's, and ends soon then.
        arguments = ["--model", model, "--task", self.task, "--output", str(folder), *shlex.split(self.options)]
        if self.task == "drift" and name == BASE and _BASE not in arguments:
            arguments += [_BASE, model]  # its drift from itself, which is 0
        if runner.base.loading.trust_remote_code and _TRUST not in arguments:
            arguments.append(_TRUST)
        failure = runner.launch("evaluate.py", arguments, f"{name}-{kind}", lambda: None)
        if failure is not None:
            return None, failure
        found = read_json(folder / RESULTS)
        if self.task in _FIGURES:
            return found[_FIGURES[self.task]], None
        return 100 * found["accuracy"], None
