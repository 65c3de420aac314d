"""What GSM-8K and MATH have in common: the prompt, and answers graded as expressions."""

from collections.abc import Iterator
from contextlib import contextmanager

from sorsa_ds.evaluate.grading.answers import ANNOUNCEMENT, announced
from sorsa_ds.evaluate.grading.grader import Grader
from sorsa_ds.evaluate.options import Style
from sorsa_ds.evaluate.prompts import STEP_BY_STEP, Shot, render
from sorsa_ds.evaluate.tasks.generated import Judge, Judgement, Question
from sorsa_ds.evaluate.tasks.task import Setting

ASK = f'\n\nThink step by step, and end with a line of its own: "{ANNOUNCEMENT}" and the result.'
"""What a chat model is told, which was not trained on the papers' layout."""

RULES = 2
"""Counts up when what is taken for an answer, or for equal, changes: samples of other rules are not mixed."""


def prompt(style: Style, setting: Setting, problem: str, shots: list[Shot]) -> str:
    """The text of a problem, with solved ones before it."""
    opening = STEP_BY_STEP if style == "papers" else ""
    return render(style, setting.tokenizer, problem, shots, opening, ASK)


def solved(problem: str, solution: str, answer: str, style: Style) -> Shot:
    """A problem with its solution, which ends as answers are expected to."""
    opening = f"{STEP_BY_STEP.strip()} " if style == "papers" else ""
    return Shot(problem, f"{opening}{solution.strip()}\n{ANNOUNCEMENT} {answer}")


@contextmanager
def judge(questions: list[Question]) -> Iterator[Judge]:
    """Judges answers by the questions' keys, which are references."""
    references = {question.id: question.key for question in questions}
    with Grader() as grader:

        def judged(id_: str, text: str) -> Judgement:
            answer = announced(text)
            outcome = "unparsable" if answer is None else grader.grade(references[id_], answer)
            return Judgement(outcome, {"answer": answer, "reference": references[id_]})

        yield judged
