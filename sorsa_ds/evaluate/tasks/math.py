"""MATH: competition problems whose answer is in a box (Hendrycks et al. 2021), from a place that you name.

The data may be as it was published, in files `test/SUBJECT/NUMBER.json` and `train/...` that each hold an object with
problem, level, type and solution; or any file or hub data set with the columns problem and solution.
"""

from pathlib import Path

from datasets import Dataset, DatasetDict

from sorsa_ds.evaluate.datasets import DATA_OPTION, open_data, read_json
from sorsa_ds.evaluate.grading.answers import boxed
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.tasks.generated import Generated
from sorsa_ds.evaluate.tasks.math_answers import Problem, math_task
from sorsa_ds.evaluate.tasks.task import Setting

COLUMNS = ("problem", "solution")
SPLITS = ("train", "test")


def build(options: Options, setting: Setting) -> Generated:
    """The task of the test split, with few-shot examples from the training split.

    Raises:
        ValueError: there is no `--data`, it cannot be read, or it has a solution without a box.
    """
    if options.data is None:
        raise ValueError(
            f"--task math needs {DATA_OPTION}: a folder in the published format (test/SUBJECT/NUMBER.json), a file "
            "with the columns problem and solution, or a hub name"
        )
    splits = published(Path(options.data).expanduser()) or open_data(options.data, None, options.columns)
    return math_task(splits, COLUMNS, _problem, options, setting)


def _problem(row: dict) -> Problem:
    groups = tuple(value for name in ("level", "type", "subject") if isinstance(value := row.get(name), str))
    return Problem(row["problem"], row["solution"], reference_of(row), groups)


def published(folder: Path) -> DatasetDict | None:
    """The splits of a folder with one file per problem, sorted by name; None where the folder is of another kind."""
    files = {split: sorted((folder / split).glob("*/*.json"), key=_place) for split in SPLITS}
    if not any(files.values()):
        found = sorted(folder.glob("*/*.json"), key=_place)  # the folder may be a split itself
        files = {"test": found}
    splits = {split: Dataset.from_list([_row(file) for file in named]) for split, named in files.items() if named}
    return DatasetDict(splits) if splits else None


def reference_of(row: dict) -> str:
    """The reference answer: in the box of the solution, or in a column of its own.

    Raises:
        ValueError: the row has neither.
    """
    reference = boxed(row["solution"]) or row.get("answer")
    if reference is None or isinstance(reference, bool) or not isinstance(reference, str | int) or reference == "":
        raise ValueError(f"a solution without \\boxed, and no answer: {row['solution'][-100:]!r}")
    return str(reference)


def _place(file: Path) -> tuple[str, int, str]:
    return file.parent.name, int(file.stem) if file.stem.isdigit() else 0, file.stem


def _row(file: Path) -> dict:
    row = read_json(file)
    if missing := [name for name in COLUMNS if not isinstance(row.get(name), str)]:
        raise ValueError(f"{DATA_OPTION}: {file} has no text in {', '.join(missing)}")
    return {name: str(row.get(name, "")) for name in (*COLUMNS, "level", "type")}
