"""GSM-8K: grade-school word problems whose answer is a number (Cobbe et al. 2021)."""

import re

from sorsa_ds.evaluate.datasets import SETTING, first, open_data, rows_of, shots_of
from sorsa_ds.evaluate.grading.answers import marked
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.tasks import math_answers
from sorsa_ds.evaluate.tasks.generated import Generated, Question
from sorsa_ds.evaluate.tasks.task import Setting

HUB, CONFIG = "openai/gsm8k", "main"
COLUMNS = ("question", "answer")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def build(options: Options, setting: Setting) -> Generated:
    """The test split; examples from the training split.

    Raises:
        ValueError: data that cannot be read, or has an answer without `####`.
    """
    splits = open_data(options.data or HUB, CONFIG)
    style = options.prompt
    shots = [
        math_answers.solved(row["question"], *solution(row["answer"]), style)
        for row in shots_of(splits, ("train",), COLUMNS, options.shots)
    ]
    questions = []
    for number, row in enumerate(first(rows_of(splits, ("test",), COLUMNS), options.limit)):
        text = math_answers.prompt(style, setting, row["question"], shots)
        questions.append(Question(f"gsm8k/{number}", text, solution(row["answer"])[1]))
    return Generated(questions, setting, options.new_tokens, math_answers.judge(questions))


def solution(answer: str) -> tuple[str, str]:
    """(the worked solution without calculator annotations, the number behind `####`).

    Raises:
        ValueError: there is no `####`.
    """
    reference = marked(answer)
    if reference is None:
        raise ValueError(f"{SETTING}: an answer without '####': {answer[-100:]!r}")
    return _CALCULATION.sub("", answer[: answer.rindex("####")]).strip(), reference
