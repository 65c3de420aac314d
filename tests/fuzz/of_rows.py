"""Rows of data, one JSON object per line or separated by commas, in every format."""

import csv
import io
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import rules
from tests.fuzz.kinds import Kind
from tests.fuzz.mutations import as_json, changed_text, changed_tree, file_bytes, junk
from tests.fuzz.rules import Nonsense

ROWS: dict[str, list[dict[str, Any]]] = {
    "metamath": [{"query": f"What is {n} plus 1?", "response": f"It is {n + 1}."} for n in range(4)],
    "alpaca": [
        {"instruction": "Add, please.", "input": "1, 2", "output": "3"},
        {"instruction": "Say 'no'.", "input": "", "output": 'A "quoted", long\nanswer'},
        {"instruction": "é日本?", "input": "x", "output": "  spaces  "},
    ],
    "gsm8k": [{"question": f"{n} apples?", "answer": f"#### {n}"} for n in range(3)],
    "text": [{"text": "Once upon a time."}, {"text": "The end: 007"}],
    "chat": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]},
        {"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"}, {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So it is."},
        ]},
    ],
}  # fmt: skip
PROMPT_AND_RESPONSE = {
    "metamath": ("query", "response"), "alpaca": ("instruction", "output"), "gsm8k": ("question", "answer"),
    "text": ("text", "text"),
}  # fmt: skip
END = "<|im_end|>"
"""The end token of the tokenizer, which is also the end of a turn in its template."""
CELLS = ("", " ", "NA", "null", "007", "1.5", "true", "a,b", 'say "no"', "two\nlines", "é日本", "y" * 3000, "-", "1e5")


@cache
def tokenizer():
    """One whose tokens give the text back exactly."""
    from tests.helpers.chat_tokenizer import chat_tokenizer

    return chat_tokenizer()


def make_jsonl(rng: Random) -> tuple[bytes, str]:
    """Rows with an entry or characters changed, taken away or mixed with rows of another format."""
    name = rng.choice(list(ROWS))
    rows = [dict(row) for row in ROWS[name]]
    if rng.random() < 0.6:
        place = rng.randrange(len(rows))
        rows[place] = junk(rng) if rng.random() < 0.1 else changed_tree(rng, rows[place])
        return "".join(as_json(row) + "\n" for row in rows).encode(), name
    return file_bytes(rng, changed_text(rng, "".join(as_json(row) + "\n" for row in rows))), name


def make_csv(rng: Random) -> tuple[bytes, str]:
    """A table with cells, rows, columns or characters changed."""
    name = rng.choice(list(PROMPT_AND_RESPONSE))
    columns = list(ROWS[name][0])
    table = [columns, *([row[column] for column in columns] for row in ROWS[name])]
    if rng.random() < 0.4:
        return file_bytes(rng, changed_text(rng, _table_text(table))), name
    row = rng.choice(table)
    kind = rng.randrange(5)
    if kind < 2:
        row[rng.randrange(len(row))] = rng.choice(CELLS)
    elif kind == 2:
        row.append(rng.choice(CELLS))
    elif kind == 3:
        row.pop()
    else:
        for one in table[1:] if rng.random() < 0.5 else table:
            one.append(rng.choice(CELLS))
    return file_bytes(rng, _table_text(table)), name


def _table_text(table: list[list[str]]) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerows(table)
    return made.getvalue()


def read_rows(folder: Path, name: str) -> list[str]:
    """What is learned of each example, as text."""
    from sorsa_ds.config.schema import DataConfig
    from sorsa_ds.data.examples import load_examples

    [file] = folder.iterdir()
    data = DataConfig(path=str(file), format=name, eval_size=0, max_length=100_000)
    examples, _ = load_examples(data, tokenizer(), 0)
    return [tokenizer().decode([token for token in one["labels"] if token >= 0]) for one in examples]


def judge_jsonl(content: bytes, name: str, learned: list[str]) -> None:
    """Every line is an object whose columns are text or a number, and what is learned is its response as written."""
    _compare(rules.json_values(rules.decoded(content, "utf-8-sig")), name, learned)


def judge_csv(content: bytes, name: str, learned: list[str]) -> None:
    """Every line has as many cells as the first, and what is learned is the cell of the response."""
    text = rules.decoded(content, "utf-8-sig")
    try:
        table = [
            row
            for row in csv.reader(io.StringIO(text, newline=""), strict=True)
            if "".join(row).strip() or len(row) > 1
        ]
    except csv.Error as error:
        raise Nonsense(f"not a table: {error}") from error
    head, *rows = table or [[]]
    if len(set(head)) < len(head):
        raise Nonsense("two columns of one name")
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise Nonsense(f"row {number} has {len(row)} cells, the first line {len(head)}")
    _compare([dict(zip(head, row, strict=True)) for row in rows], name, learned)


def _compare(rows: list[Any], name: str, learned: list[str]) -> None:
    expected = [told for row in rows if (told := _learned(row, name))]
    if expected != learned:
        raise Nonsense(f"learned is {str(learned)[:200]}, the rows say {str(expected)[:200]}")


def _learned(row: Any, name: str) -> str:
    """What a row says is to be learned, as the formats are documented; empty where it is nothing."""
    if not isinstance(row, dict):
        raise Nonsense("a row that is no object")
    if name == "chat":
        return _turns(row.get("messages"))
    prompt, response = (_text(row.get(column)) for column in PROMPT_AND_RESPONSE[name])
    if response is None or (rules.utf8(response) and not response.strip()) or prompt is None:
        return ""
    context = _text(row.get("input")) if name == "alpaca" else None
    if not (rules.utf8(prompt) and rules.utf8(response) and (context in (None, "") or rules.utf8(context))):
        raise Nonsense(f"a row without text: {str(row)[:80]}")
    if name == "text":  # the first token has nothing that predicts it
        return tokenizer().decode(tokenizer()(response)["input_ids"][1:]) + END
    return ("" if response[0].isspace() else " ") + response + END


def _text(value: Any) -> Any:
    """A number in a column stands for how it is written."""
    return str(value) if isinstance(value, rules.Written) else value


def _turns(messages: Any) -> str:
    """What the assistant says in a conversation; a row without one, and a turn that says nothing, are left out."""
    if messages is None:
        return ""
    if not isinstance(messages, list) or not messages:
        raise Nonsense("messages that are no list")
    turns = []
    for message in messages:
        said = _said(message) if isinstance(message, dict) and rules.utf8(message.get("role")) else None
        if said is None:
            raise Nonsense(f"a message without text: {str(message)[:80]}")
        if message["role"] == "assistant" and said.strip():
            turns.append(said)
    if messages[0]["role"] == "assistant":
        raise Nonsense("the assistant begins")
    return "".join(said + END for said in turns)


def _said(message: dict[str, Any]) -> str | None:
    """A message's text, which may be a list of parts; None where it has none."""
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    return "".join(texts) if all(map(rules.utf8, texts)) else None


KINDS = (
    Kind("rows (JSONL)", "rows.jsonl", make_jsonl, read_rows, judge_jsonl,
         tuple(("".join(json.dumps(row) + "\n" for row in rows).encode(), name) for name, rows in ROWS.items())),
    Kind("rows (CSV)", "rows.csv", make_csv, read_rows, judge_csv,
         tuple((_table_text([list(ROWS[name][0]), *(list(row.values()) for row in ROWS[name])]).encode(), name)
               for name in PROMPT_AND_RESPONSE)),
)  # fmt: skip
