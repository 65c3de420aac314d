"""MATH: competition problems whose answer is in a box (Hendrycks et al. 2021), from a place that you name.

As it was published: `test/SUBJECT/NUMBER.json` and `train/...`, an object a file with problem, level, type and
solution; or any file or hub data set with the columns problem and solution.
"""

from pathlib import Path

from datasets import Dataset, DatasetDict

from sorsa_ds.evaluate.datasets import SETTING, first, open_data, read_json, rows_of, shots_of
from sorsa_ds.evaluate.grading.answers import boxed
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.tasks import math_answers
from sorsa_ds.evaluate.tasks.generated import Generated, Question
from sorsa_ds.evaluate.tasks.task import Setting

COLUMNS = ("problem", "solution")
SPLITS = ("train", "test")


def build(options: Options, setting: Setting) -> Generated:
    """The test split; examples from the training split.

    Raises:
        ValueError: no `--data`, data that cannot be read, or a solution without a box.
    """
    if options.data is None:
        raise ValueError(
            f"--task math needs {SETTING}: a folder in the published format (test/SUBJECT/NUMBER.json), a file with "
            "the columns problem and solution, or a hub name"
        )
    splits = published(Path(options.data).expanduser()) or open_data(options.data)
    style = options.prompt
    shots = [
        math_answers.solved(row["problem"], row["solution"], reference_of(row), style)
        for row in shots_of(splits, ("train",), COLUMNS, options.shots)
    ]
    questions = []
    for number, row in enumerate(first(rows_of(splits, ("test",), COLUMNS), options.limit)):
        text = math_answers.prompt(style, setting, row["problem"], shots)
        groups = tuple(value for name in ("level", "type", "subject") if isinstance(value := row.get(name), str))
        questions.append(Question(f"math/{number}", text, reference_of(row), groups))
    return Generated(questions, setting, options.new_tokens, math_answers.judge(questions))


def published(folder: Path) -> DatasetDict | None:
    """The splits of a folder with a file a problem, in the order of their names; None where it is no such folder."""
    files = {split: sorted((folder / split).glob("*/*.json"), key=_place) for split in SPLITS}
    if not any(files.values()):
        found = sorted(folder.glob("*/*.json"), key=_place)  # a split itself
        files = {"test": found}
    splits = {split: Dataset.from_list([_row(file) for file in named]) for split, named in files.items() if named}
    return DatasetDict(splits) if splits else None


def reference_of(row: dict) -> str:
    """The answer in the box of a solution, or in a column of its own.

    Raises:
        ValueError: there is none.
    """
    reference = boxed(row["solution"]) or row.get("answer")
    if not reference:
        raise ValueError(f"{SETTING}: a solution without \\boxed: {row['solution'][-100:]!r}")
    return reference


def _place(file: Path) -> tuple[str, int, str]:
    return file.parent.name, int(file.stem) if file.stem.isdigit() else 0, file.stem


def _row(file: Path) -> dict:
    row = read_json(file)
    if missing := [name for name in COLUMNS if not isinstance(row.get(name), str)]:
        raise ValueError(f"{SETTING}: {file} has no text in {', '.join(missing)}")
    return {name: str(row.get(name, "")) for name in (*COLUMNS, "level", "type")}
