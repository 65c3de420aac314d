"""MMLU: multiple choice in 57 subjects, by the log-likelihood of the four letters (Hendrycks et al. 2021).

The data may be as it was published, in files `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv` without a header; or
rows with the columns question, subject, choices and answer (0 to 3), as on the hub.
"""

import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sorsa_ds.data.tokenize import Example
from sorsa_ds.evaluate.backends.likelihood import Likelihood, batch_by_length
from sorsa_ds.evaluate.datasets import DATA_OPTION, complete_rows, drawn_evenly, first_rows, open_data, rows_of
from sorsa_ds.evaluate.options import Options, Style
from sorsa_ds.evaluate.prompts import Shot, prompt_tokens, render_question
from sorsa_ds.evaluate.tasks.generated import accuracy, accuracy_row
from sorsa_ds.evaluate.tasks.task import Emit, Engine, Setting
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.words import cut

HUB, CONFIG = "cais/mmlu", "all"
COLUMNS = ("question", "subject", "choices", "answer")
LETTERS = "ABCD"
INTRODUCTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
ASK = "\n\nAnswer with the letter alone."


@dataclass(frozen=True, slots=True)
class Item:
    """One question, with four choices. answer: the number of the right one, 0 to 3."""

    id: str
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def text(self) -> str:
        """The question with its choices, without what announces the letter."""
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.question.strip()}\n{listed}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the model is asked. token_ids: up to the letter. letters: the four tokens that may come next.

    shots: the number of examples that the model has room for. truncated: even the question alone is longer than the
    model takes, and its beginning is left out.
    """

    token_ids: list[int]
    letters: tuple[int, ...]
    shots: int
    truncated: bool


class Mmlu:
    """A task (`task.Task`) that compares the likelihoods of four letters, by one forward pass per question.

    Raises:
        ValueError: the tokenizer does not make one token of each letter.
    """

    def __init__(
        self,
        items: list[Item],
        shots: dict[str, list[Item]],
        style: Style,
        setting: Setting,
        notes: Sequence[str] = (),
    ):
        self.ids = [item.id for item in items]
        self._items = {item.id: item for item in items}
        self._setting, self._style, self._notes = setting, style, notes
        self._asked = {item.id: self._ask(item, shots.get(item.subject, [])) for item in items}
        self._likelihood: Likelihood

    def digest(self) -> str:
        asked = [(id_, a.token_ids, a.letters, self._items[id_].answer) for id_, a in self._asked.items()]
        return digest.of_bytes(repr(asked).encode())

    def notes(self) -> list[str]:
        fewer = sum(asked.shots < self._most for asked in self._asked.values())
        text = self._setting.tokenizer.decode(self._asked[self.ids[0]].token_ids)
        notes = [*self._notes]
        if fewer:
            notes.append(f"{fewer} questions are asked with fewer than {self._most} examples: the model takes no more.")
        if truncated := sum(asked.truncated for asked in self._asked.values()):
            notes.append(f"{truncated} questions are longer than the model takes: they lose their beginning.")
        return [*notes, f"The first prompt:\n--- prompt ---\n{text}\n--- answer ---"]

    def start(self, engine: Engine) -> None:
        self._likelihood = engine.likelihood()

    def batches(self, done: Collection[str], size: int) -> list[list[str]]:
        return batch_by_length([(i, len(a.token_ids)) for i, a in self._asked.items() if i not in done], size)

    def work(self, batch: list[str], emit: Emit) -> None:
        asked = [self._asked[id_] for id_ in batch]
        logs = self._likelihood.next_token([_example(one.token_ids) for one in asked])
        for id_, one, log_C in zip(batch, asked, logs, strict=True):
            four = log_C[torch.tensor(one.letters)]
            chosen, answer = int(four.argmax()), self._items[id_].answer
            emit({
                "id": id_,
                "correct": chosen == answer,
                "subject": self._items[id_].subject,
                "answer": LETTERS[chosen],
                "reference": LETTERS[answer],
                "log_likelihoods": [round(value, 6) for value in four.tolist()],
                "shots": one.shots,
                "tokens": len(one.token_ids),
            })  # fmt: skip

    def results(self, records: list[dict]) -> dict:
        subjects = sorted({record["subject"] for record in records})
        of_subject = {s: accuracy([r for r in records if r["subject"] == s]) for s in subjects}
        return {
            **accuracy(records),
            "macro_accuracy": sum(part["accuracy"] for part in of_subject.values()) / len(of_subject),
            "fewer_shots": sum(record["shots"] < self._most for record in records),
            "truncated_prompts": sum(self._asked[record["id"]].truncated for record in records),
            "groups": of_subject,
        }

    def rows(self, results: dict) -> list[tuple[str, str]]:
        return [
            *(accuracy_row(subject, part) for subject, part in results["groups"].items()),
            accuracy_row("all questions", results),
            ("mean of subjects", f"{100 * results['macro_accuracy']:.2f} %"),
        ]

    def close(self) -> None:
        """Return at once: this task keeps nothing open that would have to be ended."""

    def _ask(self, item: Item, shots: list[Item]) -> _Asked:
        """The question with as many examples as the model has room for, or the end of it where it is too long alone."""
        room = self._setting.positions
        for count in range(len(shots), -1, -1):
            text = self._text(item, shots[:count])
            token_ids, letters = _up_to_the_letter(text, self._style, self._setting)
            if room is None or len(token_ids) <= room:
                return _Asked(token_ids, letters, count, truncated=False)
        assert room is not None, "without a limit every question has room"
        return _Asked(token_ids[-room:], letters, 0, truncated=True)

    def _text(self, item: Item, shots: list[Item]) -> str:
        examples = [Shot(shot.text(), LETTERS[shot.answer]) for shot in shots]
        if self._style == "chat":
            return render_question("chat", self._setting.tokenizer, item.id, item.text(), examples, ask=ASK)
        subject = item.subject.replace("_", " ")
        answered = [f"{shot.question}\nAnswer: {shot.answer}" for shot in examples]
        return INTRODUCTION.format(subject=subject) + "\n\n".join([*answered, f"{item.text()}\nAnswer:"])

    @property
    def _most(self) -> int:
        return max(asked.shots for asked in self._asked.values())


def build(options: Options, setting: Setting) -> Mmlu:
    """The task of all subjects' test splits, with few-shot examples of the same subject from the dev split.

    Raises:
        ValueError: the data cannot be read, or has fewer examples than are wanted.
    """
    published = _published(options.data)
    items, examples, notes = (*published, []) if published else _rows(options)
    items = drawn_evenly(items, options.limit, lambda item: item.subject)
    shots: dict[str, list[Item]] = {}
    for example in examples:
        if len(shots.setdefault(example.subject, [])) < options.shots:
            shots[example.subject].append(example)
    for subject in {item.subject for item in items}:
        if (found := len(shots.get(subject, []))) < options.shots:
            raise ValueError(
                f"--num_few_shot: {options.shots} examples are wanted, the dev split has {found} of {subject}"
            )
    return Mmlu(items, shots, options.style, setting, notes)


def _published(data: str | None) -> tuple[list[Item], list[Item]] | None:
    folder = Path(data or "").expanduser()
    files = {split: sorted((folder / split).glob(f"*_{split}.csv")) for split in ("test", "dev")}
    if data is None or not files["test"]:
        return None
    test, dev = ([item for file in files[split] for item in _read(file, split)] for split in ("test", "dev"))
    return test, dev


def _read(file: Path, split: str) -> Iterator[Item]:
    subject = file.stem.removesuffix(f"_{split}")
    with file.open(encoding="utf-8", newline="") as lines:
        for number, cells in enumerate(csv.reader(lines)):
            if len(cells) != 6 or cells[5] not in LETTERS:
                raise ValueError(
                    f"{DATA_OPTION}: {file}, row {number + 1}: not a question, four choices and a letter: {cells}"
                )
            yield Item(
                f"{subject}/{number}", subject, cells[0], tuple(cells[1:5]), LETTERS.index(cells[5])
            )  # fmt: skip


def _rows(options: Options) -> tuple[list[Item], list[Item], list[str]]:
    splits = open_data(options.data or HUB, CONFIG, options.columns)
    test, notes = _items(first_rows(rows_of(splits, ("test",), COLUMNS), None))
    dev = _items(first_rows(rows_of(splits, ("dev",), COLUMNS), None))[0] if options.shots else []
    return test, dev, notes


def _items(rows: list[dict]) -> tuple[list[Item], list[str]]:
    """The questions of rows, and a sentence on rows that lack something."""
    items: list[Item] = []
    counts: dict[str, int] = {}
    found, notes = complete_rows(rows, ("question", "subject", "answer"))
    for row in found:
        cells = row.cells
        subject, choices, answer = cells["subject"], cells["choices"], cells["answer"].strip()
        number = counts[subject] = counts.get(subject, -1) + 1
        with row.named():
            texts = isinstance(choices, list) and all(type(choice) in (str, int) for choice in choices)
            if not texts or len(choices) != 4 or answer not in (*"0123", *LETTERS):
                raise ValueError(
                    f"four choices and an answer from 0 to 3, or A to D, are needed, not {cut(repr(cells))}"
                )
        place = LETTERS.index(answer) if answer in LETTERS else int(answer)
        items.append(Item(f"{subject}/{number}", subject, cells["question"], tuple(map(str, choices)), place))
    return items, notes


def _up_to_the_letter(text: str, style: Style, setting: Setting) -> tuple[list[int], tuple[int, ...]]:
    """(tokens before the letter, the four letters' tokens): what the four continuations share, and where they differ.

    Raises:
        ValueError: a letter is not one token.
    """
    gap = "" if style == "chat" else " "
    four = [prompt_tokens(f"{text}{gap}{letter}", setting.tokenizer, setting.bare) for letter in LETTERS]
    shared = next(place for place, ids in enumerate(zip(*four, strict=False)) if len(set(ids)) > 1)
    if any(len(ids) != shared + 1 for ids in four):
        raise ValueError("--task mmlu: the tokenizer does not make one token of each of the letters A, B, C, D")
    return four[0][:shared], tuple(ids[shared] for ids in four)


def _example(token_ids: list[int]) -> Example:
    ids = np.array(token_ids, dtype=np.int32)
    return {"input_ids": ids, "labels": ids}
