"""How a row of data becomes a text of which some spans are learned.

The instruction formats share the papers' prompt, the Alpaca layout. The prompt ends with the colon after
"### Response", and the learned part starts with the space behind that colon. Tokenizers join a space to the word that
follows, so prompt and response meet between two tokens, in training as in generation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.chat import render_chat
from sorsa_ds.data.conversations import Learn
from sorsa_ds.runtime.words import cut

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
INSTRUCTION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"
)

COLUMNS = {
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "metamath": ("query", "response"),
    "codefeedback": ("query", "answer"),
    "gsm8k": ("question", "answer"),
    "text": ("text",),
}
"""The columns that each format needs; `auto` takes the first format whose columns are all there."""

CONTEXT_COLUMN = "input"
"""Alpaca's third column. A row may leave it empty, and a data set may lack it."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example before tokenisation.

    text: what the tokenizer gets.
    learned: the character spans [start, end) on which the loss is taken.
    closed: whether the tokenizer's end token has to be appended and learned.
    bare: whether the tokenizer must add no special tokens of its own, because a template has written all of them.
    left_out: why the row is no example, in a few words by which rows are counted; empty where it is one.
    tokens: input_ids and labels of a row that is stored as tokens, which has no text.
    notes: what of the row is learned otherwise than one might think, in words by which rows are counted.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    closed: bool
    bare: bool = False
    left_out: str = ""
    tokens: tuple[list[int], list[int]] | None = None
    notes: tuple[str, ...] = ()


def prompt_for(question: str, context: str = "") -> str:
    """The papers' prompt, up to where the model answers.

    Args:
        context: Alpaca's input; the prompt has no heading for it where it is empty.
    """
    layout = INSTRUCTION_WITH_INPUT if context else INSTRUCTION
    return layout.format(instruction=question, context=context)


def detect_format(columns: Sequence[str]) -> str:
    """The first known format whose columns are all there.

    Raises:
        ValueError: no format fits; the message lists the columns found and the formats known.
    """
    for name, needed in COLUMNS.items():
        if set(needed) <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
    raise ValueError(f"data.format: the columns {_listed(columns)} fit no known format ({known})")


def resolve_format(name: str, columns: Sequence[str]) -> str:
    """The format to use: `auto` is resolved by the columns, any other is checked against them.

    Raises:
        ValueError: a column that the format needs is missing, or no format fits.
    """
    if name == "auto":
        return detect_format(columns)
    missing = [column for column in COLUMNS[name] if column not in columns]
    if missing:
        raise ValueError(f"data.format: {name} needs the column {_listed(missing)}; there are {_listed(columns)}")
    return name


def render(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase, learn: Learn = "all") -> Rendered:
    """Render one row in a format that `resolve_format` gave. Of a row without a response nothing is learned.

    Args:
        learn: which assistant turns of a conversation are learned.

    Raises:
        ValueError: a column holds no text, or the chat template cannot be used.
    """
    if name == "chat":
        return Rendered(**render_chat(row, tokenizer, learn)._asdict())
    if name == "text":
        text = _text_of(row, "text")
        return Rendered(text, ((0, len(text)),), closed=True) if text else Rendered("", (), closed=False)
    question, answer = (_text_of(row, column) for column in COLUMNS[name])
    has_context = name == "alpaca" and row.get(CONTEXT_COLUMN) is not None
    context = _text_of(row, CONTEXT_COLUMN) if has_context else ""
    return _instruction(prompt_for(question, context), answer)


def _instruction(prompt: str, response: str) -> Rendered:
    if not response:
        return Rendered(prompt, (), closed=False)
    gap = "" if response[0].isspace() else " "
    text = prompt + gap + response
    return Rendered(text, ((len(prompt), len(text)),), closed=True)


def _text_of(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        held = "nothing" if value is None else cut(repr(value))
        raise ValueError(f"column {column!r} holds {held} where text is needed")
    return value


def _listed(columns: Sequence[str]) -> str:
    """Names of columns, which come from a file: long ones are cut, and not more than 20 are told."""
    told = [repr(cut(column, 60)) for column in columns[:20]]
    return ", ".join([*told, f"and {len(columns) - 20} more"] if len(columns) > 20 else told)
