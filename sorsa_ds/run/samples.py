"""samples.jsonl: what a run's model has answered to held-out prompts on its way. Nothing heavy is imported."""

from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.run.metrics import read_steps
from sorsa_ds.run.paths import SAMPLES
from sorsa_ds.runtime.words import first_lines

_LINES, _WIDTH = 4, 110
"""How much of a text is shown on the console: that many lines, and characters of a line."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer to a held-out prompt.

    source: the prompt's, a name among the run's sources of data. number: its place among these, from 0.
    prompt, expected: the texts of the held-out example. answer: what the model has written. ended: by its end token;
    False: it was cut at the limit.
    """

    source: str
    number: int
    prompt: str
    expected: str
    answer: str
    ended: bool


def read_samples(folder: Path) -> list[dict]:
    """The lines of a run's samples.jsonl, each a `Sample` with its `step`; none where there is no such file.

    Raises:
        ValueError: a line is not one that a run writes; the message names it.
    """
    path, texts = folder / SAMPLES, ("prompt", "expected", "answer")
    found = read_steps(path)
    for number, line in enumerate(found, start=1):
        if not all(isinstance(line.get(name), str) for name in texts):
            raise ValueError(f"{path}, line {number}: lacks {', '.join(texts)}; the file is damaged")
    return found


def shown(sample: Sample) -> str:
    """A sample for the console: the end of its prompt and the beginning of the answer, cut to a few lines."""
    asked = [line for line in sample.prompt.splitlines() if line.strip()][-_LINES:]
    cut = "" if sample.ended else "  [cut at evaluation.sample_tokens]"
    answered = first_lines(sample.answer.strip(), _LINES, _WIDTH) or "(nothing)"
    return (
        "\n".join(
            [
                *(f"  > {first_lines(line, 1, _WIDTH)}" for line in asked),
                *(f"  {line}" for line in answered.splitlines()),
            ]
        )
        + cut
    )
