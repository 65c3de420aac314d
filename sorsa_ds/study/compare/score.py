"""What a comparison's models score, through launch/evaluate.py, which writes every sample and goes on where it was."""

import json
import shlex
from dataclasses import dataclass

from sorsa_ds.evaluate.records import RESULTS
from sorsa_ds.runtime import digest
from sorsa_ds.study.compare.runner import Runner

TASKS = ("gsm8k", "math", "humaneval", "mmlu", "loss")
BASE = "base"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured: launch/evaluate.py's --task, and its other options as they are written there."""

    task: str
    options: str

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"--task: there is no {self.task!r}; there are {', '.join(TASKS)}")
        try:
            words = shlex.split(self.options)
        except ValueError as error:
            raise ValueError(f"--task_options: {self.options!r} cannot be read: {error}") from error
        taken = [word for word in words if word.partition("=")[0] in ("--model", "--task", "--output")]
        if taken:
            raise ValueError(f"--task_options: {taken[0]} is set by the comparison")

    @property
    def score(self) -> str:
        """What is measured, with its unit."""
        return "perplexity" if self.task == "loss" else "accuracy_percent"

    @property
    def heading(self) -> str:
        """The same, for people."""
        return "perplexity" if self.task == "loss" else f"{self.task}, %,"

    def of(self, model: str, name: str, runner: Runner) -> tuple[float | None, str | None]:
        """(the score of a model, None), or (None, why there is none).

        Args:
            model: a run's folder, or whatever else launch/evaluate.py takes. name: of its folder of results.

        Raises:
            Preempted: a signal came; samples made so far are kept.
        """
        kind = f"{self.task}-{digest.of_bytes(self.options.encode())[:8]}"  # others, if asked for, do not mix
        folder = runner.output / "evaluations" / kind / name
        # Also where results are: the command tells whether they are this model's, and soon ends then.
        arguments = ["--model", model, "--task", self.task, "--output", str(folder), *shlex.split(self.options)]
        failure = runner.launched("evaluate.py", arguments, f"{name}-{kind}", lambda: None)
        if failure is not None:
            return None, failure
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return found["perplexity"] if self.task == "loss" else 100 * found["accuracy"], None
