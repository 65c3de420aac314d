"""Files and rows as people have them, and what has to become of each: learned as written, left out, or refused.

`silent_changes` reads every one as training does and says of which something else was learned than stands in it, or
fewer or other rows without a word. The tests go through the same cases.
"""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.layout import layout_of
from sorsa_ds.data.source import load_rows
from sorsa_ds.data.tokenize import IGNORED, encode_all

ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of data.

    name: the name of the kind.
    write: puts the data into a folder, and returns the path to give.
    learned: what has to be learned, one text a row, without the end token; None where the data has to be refused.
    said: what the refusal has to name.
    left_out: the number of rows that are no example, which has to be told.
    settings: the settings of the section `data` beside the path.
    shown: what has to stand in the whole first example.
    """

    name: str
    write: Callable[[Path], Path]
    learned: Sequence[str] | None
    said: Sequence[str] = ()
    left_out: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    shown: str = ""


def silent_changes(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What was changed silently, one line for each case of which that is true.

    Args:
        folder: an empty one, for the files.
        tokenizer: one whose tokens give the text back.
    """
    found = []
    for number, case in enumerate(CASES):
        place = folder / str(number)
        place.mkdir()
        if fault := fault_of(case, place, tokenizer):
            found.append(f"{case.name}: {fault}")
    return found


def fault_of(case: Case, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """How a case came out otherwise than it has to; empty where it did not."""
    config = DataConfig(path=str(case.write(folder)), eval_size=0, max_length=10_000, **case.settings)
    try:
        rows, _ = load_rows(config, 0)
        found = encode_all(rows, layout_of(config, rows.column_names), tokenizer, config.max_length, "data")
    except ValueError as error:
        if case.learned is None:
            missing = [word for word in case.said if word not in str(error)]
            return f"the refusal does not name {missing}: {error}" if missing else ""
        return f"refused: {error}"
    learned = [
        tokenizer.decode([token for token in example["labels"] if token != IGNORED]).removesuffix(tokenizer.eos_token)
        for example in found.examples
    ]
    if case.learned is None:
        return f"accepted, learned {learned}"
    if learned != list(case.learned):
        return f"learned {learned} in place of {list(case.learned)}"
    if found.left_out.total() != case.left_out:
        return f"left out {dict(found.left_out)}, where {case.left_out} rows are no example"
    first = tokenizer.decode(found.examples[0]["input_ids"])
    return "" if case.shown in first else f"the first example lacks {case.shown!r}: {first!r}"


def _file(name: str, content: str | bytes) -> Callable[[Path], Path]:
    """One file."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def _folder(**files: str | bytes) -> Callable[[Path], Path]:
    """A folder of files; `__` stands for a dot in a name, and `___` for a slash."""

    def write(folder: Path) -> Path:
        for name, content in files.items():
            _file(name.replace("___", "/").replace("__", "."), content)(folder)
        return folder

    return write


def _lines(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _asked(*answers: Any, **more: Any) -> str:
    """JSONL of questions with these answers."""
    return _lines(*({"question": "q", ANSWER: answer, **more} for answer in answers))


def _parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)
    return path


def _saved(folder: Path) -> Path:
    Dataset.from_list([{"question": "q", ANSWER: "a"}]).save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_splits(folder: Path) -> Path:
    splits = {name: Dataset.from_list([{"question": "q", ANSWER: name}]) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


def _neighbours(name: str) -> Callable[[Path], Path]:
    """A file beside another that its name as a pattern would match."""

    def write(folder: Path) -> Path:
        _file("a*b.jsonl", _asked("other"))(folder)
        _file("axb.jsonl", _asked("other"))(folder)
        return _file(name, _asked("own"))(folder)

    return write


def _parquet_of_two_kinds(folder: Path) -> Path:
    _parquet(folder / "1.parquet", {"question": ["q"], ANSWER: ["a"], "score": [1.5]})
    _parquet(folder / "2.parquet", {"question": ["q"], ANSWER: ["b"], "score": ["high"], "more": [1]})
    return folder


def _table_cells(*cells: str) -> str:
    return "question,answer\n" + "".join(f"q,{cell}\n" for cell in cells)


_CONFIGS = {
    f"{name}___{split}-00000-of-00001__jsonl": _asked(f"{name} {split}")
    for name in ("main", "other")
    for split in ("train", "test")
}
_CELLS = ("NA", "None", "null", "007", "1.50", "TRUE", "nan", "2024-01-05", "1e5", "-")
_NUMBERS = '{"question": "q", "answer": 1.50}\n{"question": "q", "answer": 12345678901234567890123}\n'
_TOKENS = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
_CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}

CASES: tuple[Case, ...] = (
    # Files and folders
    Case("train.jsonl beside more.jsonl", _folder(train__jsonl=_asked(*"123"), more__jsonl=_asked(*"45678")),
         [f" {n}" for n in "45678123"]),
    Case("unit-test.jsonl and dev-notes.jsonl",
         _folder(**{"unit-test__jsonl": _asked("u"), "dev-notes__jsonl": _asked("d")}), [" d", " u"]),
    Case("splits by name", _folder(train__jsonl=_asked("a"), test__jsonl=_asked("b")), [" a"]),
    Case("splits by folder", _folder(data___train___1__jsonl=_asked("a"), data___test___1__jsonl=_asked("b")), [" a"]),
    Case("splits by the end of a name", _folder(my_train__jsonl=_asked("a"), my_test__jsonl=_asked("b")), [" a"]),
    Case("a test split beside a file of no split", _folder(test__jsonl=_asked("a"), more__jsonl=_asked("b")), None,
         said=["test.jsonl", "more.jsonl"]),
    Case("a name with [v2]", _neighbours("a[v2]b.jsonl"), [" own"]),
    Case("a name with ?", _neighbours("a?b.jsonl"), [" own"]),
    Case("a name with ::", _neighbours("a::b.jsonl"), [" own"]),
    Case("several data sets in a folder", _folder(**_CONFIGS), None, said=["main", "other", "data.name"]),
    Case("one of several data sets", _folder(**_CONFIGS), [" main train"], settings={"name": "main"}),
    Case("a folder of save_to_disk", _saved, [" a"]),
    Case("splits of save_to_disk", _saved_splits, [" train"]),
    Case("indented JSON beside the data",
         _folder(a__jsonl=_asked("a"), config__json=json.dumps({"a": {"b": 1}}, indent=1)), [" a"]),
    Case("indented JSON beside broken data", _folder(a__jsonl='{"question": ', b__json='{\n "a": 1\n}'), None,
         said=["a.jsonl, line 1"]),
    Case("unused columns of other types",
         _folder(a__jsonl=_asked("a", meta={"x": 1}), b__jsonl=_asked("b", meta="text", id=7)), [" a", " b"]),
    Case("Parquet files of other types", _parquet_of_two_kinds, [" a", " b"]),
    Case("an indented array, packed", _file("a.json.gz", gzip.compress(
        json.dumps([{"question": "q", ANSWER: "a"}, {"question": "q", ANSWER: "b"}], indent=2).encode())),
        [" a", " b"]),
    Case("an empty array", _file("a.json", "[]"), None, said=["a.json is empty"]),
    # Types
    Case("text that looks like a date", _file("a.jsonl", _asked("2024-01-05", "2024-01-05T10:00:00Z")),
         [" 2024-01-05", " 2024-01-05T10:00:00Z"]),
    Case("cells of CSV", _file("a.csv", _table_cells(*_CELLS)), [f" {cell}" for cell in _CELLS]),
    Case("a column of numbers in CSV", _file("a.csv", _table_cells("1", "2.0", "007")), [" 1", " 2.0", " 007"]),
    Case("an empty cell in CSV", _file("a.csv", "text\nfirst\n\"\"\nlast\n"), ["irst", "ast"], left_out=1),
    Case("numbers in JSON", _file("a.jsonl", _NUMBERS), [" 1.50", " 12345678901234567890123"]),
    Case("a number in Alpaca's input", _file("a.jsonl", _lines({"instruction": "i", "input": 0, "output": "o"})),
         [" o"], shown="### Input:\n0\n"),
    Case("a boolean", _file("a.jsonl", _asked("a", True)), None, said=["row 2", ANSWER, "True"]),
    Case("a false input", _file("a.jsonl", _lines({"instruction": "i", "input": False, "output": "o"})), None,
         said=["row 1", "input"]),
    Case("whole numbers in Parquet", lambda f: _parquet(f / "a.parquet", {"question": ["q"], ANSWER: [72]}), [" 72"]),
    Case("fractions in Parquet", lambda f: _parquet(f / "a.parquet", {"question": ["q"], ANSWER: [0.1]}), None,
         said=["row 1", ANSWER, "0.1"]),
    Case("NaN in a column that is not used", _file("a.jsonl", '{"question": "q", "answer": "a", "score": NaN}\n'),
         [" a"]),
    # Rows
    Case("null", _file("a.jsonl", _asked("a", None) + '{"question": null, "answer": "b"}\n{"answer": "c"}\n'), [" a"],
         left_out=3),
    Case("blank responses", _file("a.jsonl", _asked("a", "", " \n")), [" a"], left_out=2),
    Case("blanks around a response", _file("a.jsonl", _asked("  a \r\n")), ["  a \r\n"]),
    # Shapes
    Case("Alpaca's system and history", _file("a.jsonl", _lines(
        {"instruction": "i", "input": "", "output": "o", "system": "Be brief.", "history": [["q1", "a1"]]})), [" o"],
        shown="Be brief.\n\n### Instruction:\nq1\n\n### Response: a1\n\n### Instruction:\ni\n\n### Response: o"),
    Case("prompt and completion", _file("a.jsonl", _lines({"prompt": "Q: ", "completion": "A"})), ["A"], shown="Q: A"),
    Case("tokens", _file("a.jsonl", _lines(_TOKENS | {"attention_mask": [1, 1, 1, 1]})), ["%&"]),
    Case("padded tokens", _file("a.jsonl", _lines(
        {"input_ids": [5, 6, 7, 0], "labels": [-100, -100, 7, -100], "attention_mask": [1, 1, 1, 0]})), ["%"]),
    Case("labels that are moved by one", _file("a.jsonl", _lines(_TOKENS | {"labels": [6, 7, 8, -100]})), None,
         said=["row 1", "labels"]),
    Case("a system column under a plain format", _file("a.jsonl", _asked("a", system="Be brief.")), None,
         said=["row 1", "system"]),
    Case("an empty system column", _file("a.jsonl", _asked("a", system="")), [" a"]),
    Case("tools under a plain format", _file("a.jsonl", _asked("a", tools=[{"name": "f"}])), None,
         said=["row 1", "tools"]),
    Case("images under a plain format", _file("a.jsonl", _asked("a", images=["1.png"])), None, said=["images"]),
    Case("a context that would be dropped", _file("a.jsonl", _asked("a", context="c")), None, said=["context"]),
    Case("a system prompt beside a conversation", _file("a.jsonl", _lines(_CHAT | {"system_prompt": "Be rude."})), None,
         said=["row 1", "'system_prompt'", "Be rude."]),
    Case("a context beside a conversation", _file("a.jsonl", _lines(_CHAT, _CHAT | {"context": "long passage"})), None,
         said=["row 2", "'context'"]),
    *(Case(f"{column} beside a conversation", _file("a.jsonl", _lines(_CHAT | {column: ["x"]})), None,
           said=["row 1", repr(column)]) for column in ("history", "choices", "options", "passage", "documents")),
    Case("two conversations in a row", _file("a.jsonl", _lines(
        _CHAT | {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "other"}]})), None,
        said=["row 1", "'conversations'", "data.columns={messages: COLUMN}"]),
    Case("two conversations of which one is named", _file("a.jsonl", _lines(
        _CHAT | {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "other"}]})), ["other"],
        settings={"columns": {"messages": "conversations"}}),
    Case("empty and other columns beside a conversation", _file("a.jsonl", _lines(
        _CHAT | {"id": 3, "context": "", "history": [], "system": "Be brief."})), ["a"], shown="Be brief."),
    Case("a context beside prompt and completion as messages", _file("a.jsonl", _lines(
        {"prompt": _CHAT["messages"][:1], "completion": _CHAT["messages"][1:], "context": "c"})), None,
        said=["row 1", "'context'"]),
    Case("a system column beside prompt and completion as messages", _file("a.jsonl", _lines(
        {"prompt": _CHAT["messages"][:1], "completion": _CHAT["messages"][1:], "system": "Be brief."})), ["a"],
        shown="Be brief."),
    # Columns
    Case("columns of other names", _file("a.jsonl", _lines({"inv_question": "Q", "inv_answer": "A", "query": "no"})),
         [" A"], settings={"columns": {"prompt": "inv_question", "response": "inv_answer"}}, shown="tion:\nQ\n"),
    Case("a column that is not there", _file("a.jsonl", _asked("a")), None,
         settings={"columns": {"prompt": "question", "response": "reply"}}, said=["reply", ANSWER]),
    Case("a prompt of one's own", _file("a.jsonl", '{"topic": "T", "n": 1.50, "answer": "A"}\n'
         '{"topic": null, "n": 2, "answer": "B"}\n'), ["A"], left_out=1,
        settings={"prompt": "{{ topic }} {{ n }}\n", "columns": {"response": ANSWER}}, shown="T 1.50\nA"),
    Case("a prompt that compares a number", _file("a.jsonl", '{"n": 1, "answer": "A"}\n{"n": 0, "answer": "B"}\n'),
         ["A", "B"], settings={"prompt": "{{ 'one' if n == 1 else 'other' }} ", "columns": {"response": ANSWER}},
         shown="one A"),
    Case("a prompt that asks whether a number is zero", _file("a.jsonl", '{"n": 0, "answer": "A"}\n'), ["A"],
         settings={"prompt": "{{ 'some' if n else 'none' }} ", "columns": {"response": ANSWER}}, shown="none A"),
    Case("a prompt that compares a number with text", _file("a.jsonl", '{"n": 1, "answer": "A"}\n'), None,
         settings={"prompt": "{{ 'one' if n == '1' else 'other' }} ", "columns": {"response": ANSWER}},
         said=["row 1", "data.prompt", "number 1"]),
    Case("a prompt that trims null", _file("a.jsonl", '{"n": null, "answer": "A"}\n{"n": "q", "answer": "B"}\n'),
         ["B"], left_out=1, settings={"prompt": "{{ n | trim }} ", "columns": {"response": ANSWER}}),
    Case("a prompt with a column that is not there", _file("a.jsonl", _asked("a")), None,
         settings={"prompt": "{{ qestion }}"}, said=["qestion"]),
)  # fmt: skip
