"""What GSM-8K and MATH have in common: the prompt, few-shot examples, and answers graded as expressions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from datasets import DatasetDict

from sorsa_ds.evaluate.datasets import Row, complete_rows, drawn_evenly, first_rows, rows_of, shots_of
from sorsa_ds.evaluate.grading.answers import ANNOUNCEMENT, announced
from sorsa_ds.evaluate.grading.grader import Grader
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.prompts import STEP_BY_STEP, Shot, render_question
from sorsa_ds.evaluate.tasks.generated import Generated, Judge, Judgement, Question
from sorsa_ds.evaluate.tasks.task import Setting

ASK = f'\n\nThink step by step, and end with a line of its own: "{ANNOUNCEMENT}" and the result.'
"""The instruction for a chat model, which was not trained on the papers' layout."""

RULES = 2
"""Version of the rules that find an answer and call it equal: samples of different versions are not mixed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row of the data. answer: the reference. groups: names under which the accuracy is reported too."""

    text: str
    solution: str
    answer: str
    groups: tuple[str, ...] = ()


def math_task(
    splits: DatasetDict, columns: Sequence[str], read: Callable[[dict], Problem], options: Options, setting: Setting
) -> Generated:
    """The task of the test split, with few-shot examples from the training split.

    A limited number of rows is drawn evenly over the subjects that they name in `type` or `subject`.

    Args:
        columns: the columns that a row must have.
        read: makes a problem of a row.

    Raises:
        ValueError: a split or a column is missing, or a row cannot be read.
    """
    style = options.style
    opening = STEP_BY_STEP if style == "papers" else ""
    shots = [_solved(read(row), opening) for row in shots_of(splits, ("train",), columns, options.shots)]
    rows, notes = complete_rows(first_rows(rows_of(splits, ("test",), columns), None), columns)
    questions = []
    for row in drawn_evenly(rows, options.limit, _subject):
        with row.named():
            problem = read(row.cells)
        id_ = f"{options.task}/{row.number - 1}"
        prompt = render_question(style, setting.tokenizer, id_, problem.text, shots, opening, ASK)
        questions.append(Question(id_, prompt, problem.answer, problem.groups))
    return Generated(questions, setting, options.new_tokens, judge_expressions(questions), notes)


def _subject(row: Row) -> str:
    return str(row.cells.get("type") or row.cells.get("subject") or "")


def _solved(problem: Problem, opening: str) -> Shot:
    """A few-shot example, whose solution ends in the way in which answers are expected to end."""
    before = f"{opening.strip()} " if opening else ""
    return Shot(problem.text, f"{before}{problem.solution.strip()}\n{ANNOUNCEMENT} {problem.answer}")


@contextmanager
def judge_expressions(questions: list[Question]) -> Iterator[Judge]:
    """A judge that compares answers with the questions' keys, which are references."""
    references = {question.id: question.key for question in questions}
    with Grader() as grader:

        def judged(id_: str, text: str) -> Judgement:
            answer = announced(text)
            outcome = "unparsable" if answer is None else grader.grade(references[id_], answer)
            return Judgement(outcome, {"answer": answer, "reference": references[id_]})

        yield judged
