"""GSM-8K: grade-school word problems whose answer is a number (Cobbe et al. 2021)."""

import re

from sorsa_ds.evaluate.datasets import open_data
from sorsa_ds.evaluate.grading.answers import marked
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.tasks.generated import Generated
from sorsa_ds.evaluate.tasks.math_answers import Problem, math_task
from sorsa_ds.evaluate.tasks.task import Setting

HUB, CONFIG = "openai/gsm8k", "main"
COLUMNS = ("question", "answer")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"\s*[-+]?[\d.,]*\d\s*")


def build(options: Options, setting: Setting) -> Generated:
    """The task of the test split, with few-shot examples from the training split.

    Raises:
        ValueError: the data cannot be read, or has an answer without `####`.
    """
    return math_task(open_data(options.data or HUB, CONFIG, options.columns), COLUMNS, _problem, options, setting)


def _problem(row: dict) -> Problem:
    return Problem(row["question"], *solution(row["answer"]))


def solution(answer: str) -> tuple[str, str]:
    """(the worked solution without calculator annotations, the number behind `####` or the number that stands alone).

    Raises:
        ValueError: the answer has no `####`, and is not a number alone.
    """
    reference = marked(answer)
    if reference is None:
        if _NUMBER.fullmatch(answer):
            return "", answer.strip()
        raise ValueError(f"an answer without '####': {answer[-100:]!r}")
    return _CALCULATION.sub("", answer[: answer.rindex("####")]).strip(), reference
