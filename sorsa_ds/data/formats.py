"""How a row of data becomes a text of which some spans are learned.

The instruction formats share the papers' prompt, the Alpaca layout. The prompt ends with the colon after
"### Response", and the learned part starts with the space behind that colon. Tokenizers join a space to the word that
follows, so prompt and response meet between two tokens, in training as in generation.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.chat import describe_template, render_chat
from sorsa_ds.data.conversations import BESIDE, holds_messages
from sorsa_ds.data.conversations import COLUMNS as CONVERSATION
from sorsa_ds.data.layout import Layout
from sorsa_ds.data.prompt_template import NullColumnError
from sorsa_ds.runtime.json_text import parse_exact
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
_OPENING = INSTRUCTION.partition("###")[0]

TOLD = "prompt and completion hold messages, and the assistant's turns are told apart {}"

IGNORED = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example before tokenisation.

    text: what the tokenizer gets.
    learned: the character spans [start, end) on which the loss is taken.
    closed: whether the tokenizer's end token has to be appended and learned.
    bare: whether the tokenizer must add no special tokens of its own, because a template has written all of them.
    left_out: why the row is no example, in a few words by which rows are counted; empty where it is one.
    tokens: input_ids and labels of a row that is stored as tokens, which has no text.
    remarks: what of the row is learned otherwise than one might think, in words by which rows are counted.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    closed: bool
    bare: bool = False
    left_out: str = ""
    tokens: tuple[list[int], list[int]] | None = None
    remarks: tuple[str, ...] = ()


class _MissingError(Exception):
    """A row lacks something without which it is no example; the message says what."""


def prompt_for(question: str, context: str = "", system: str = "", history: Sequence[tuple[str, str]] = ()) -> str:
    """The papers' prompt, up to where the model answers.

    Args:
        context: Alpaca's input; the prompt has no heading for it where it is empty.
        system: what stands in place of the papers' first sentence.
        history: instructions with their responses that came before.
    """
    layout = INSTRUCTION_WITH_INPUT if context else INSTRUCTION
    opening, _, turn = layout.partition("###")
    if system:
        opening = f"{system}\n\n"
    elif history:
        opening = _OPENING  # which speaks of no input, since not every turn has one
    before = "".join(f"### Instruction:\n{asked}\n\n### Response: {told}\n\n" for asked, told in history)
    return opening + before + f"###{turn}".format(instruction=question, context=context)


def render(
    row: Mapping[str, Any],
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    special: re.Pattern[str] | None = None,
) -> Rendered:
    """Render one row.

    A row whose response is blank, or in which a column that is needed is missing, is no example: it is `left_out`.

    Args:
        special: `sorsa_ds.data.chat.special_tokens` of the tokenizer, for callers with many rows.

    Raises:
        ValueError: a column holds no text, or changes what the row means and is not read; or the chat template cannot
            be used.
    """
    conversation = _conversation_of(row, layout)
    _check_unread(row, layout, BESIDE if conversation is not None else ())
    if conversation is not None:
        chat = render_chat(conversation, tokenizer, layout.learn, special)
        told = () if layout.format == "chat" else (TOLD.format(describe_template(tokenizer)),)
        return Rendered(**chat._replace(remarks=(*chat.remarks, *told))._asdict())
    cells = {role: row[column] for role, column in layout.columns.items()}
    try:
        if layout.format == "tokens":
            return _stored_tokens(cells, tokenizer)
        if layout.format == "text":
            text = _response(cells, "text", layout)
            return Rendered(text, ((0, len(text)),), closed=True)
        response = _response(cells, "response", layout)
        if layout.format == "alpaca_chat":
            turns = {"messages": _turns(cells, response, layout)}
            return Rendered(**render_chat(turns, tokenizer, layout.learn, special)._asdict())
        if layout.prompt is not None:
            return _continued(layout.prompt.render(row), response, tokenizer)
        prompt = _text(cells, "prompt", layout)
        if layout.format == "completion":
            return _continued(prompt, response, tokenizer)
        return _instruction(_papers_prompt(prompt, cells, layout), response)
    except _MissingError as missing:
        return Rendered("", (), closed=False, left_out=str(missing))
    except NullColumnError:
        return Rendered("", (), closed=False, left_out="a column that data.prompt writes is null")


def _check_unread(row: Mapping[str, Any], layout: Layout, read: Sequence[str]) -> None:
    """Stop at a row with something in a column that changes what it means.

    Args:
        read: columns that are read after all.

    Raises:
        ValueError: the message names the column, and the ways out.
    """
    for column in layout.refused:
        if column in read or row[column] in (None, "", [], {}):
            continue
        if column in CONVERSATION:
            way_out = "say which column to learn with data.columns={messages: COLUMN}"
        elif layout.format == "chat":
            way_out = "write it in a message, or remove the column"
        else:
            way_out = "name its role in data.columns, write it in data.prompt, or remove the column"
        raise ValueError(
            f"column {column!r} holds {cut(repr(row[column]))}, which changes what the row means, and "
            f"data.format={layout.format} does not read it; {way_out}"
        )


def _conversation_of(row: Mapping[str, Any], layout: Layout) -> dict[str, Any] | None:
    """The row with its conversation under the names that `sorsa_ds.data.conversations` knows; None where it has none.

    Prompt and completion are a conversation where either holds messages.
    """
    others = {column: value for column, value in row.items() if column not in CONVERSATION}
    columns = layout.columns
    if layout.format == "chat":
        return {**others, "messages": row[columns["messages"]]}
    if layout.format == "completion" and layout.prompt is None:
        prompt, response = row[columns["prompt"]], row[columns["response"]]
        if holds_messages(prompt) or holds_messages(response):
            return {**others, "prompt": prompt, "completion": response}
    return None


def _papers_prompt(prompt: str, cells: Mapping[str, Any], layout: Layout) -> str:
    context, system = (_text_or_none(cells, role, layout) for role in ("input", "system"))
    return prompt_for(prompt, context, system, _history(cells, layout))


def _turns(cells: Mapping[str, Any], response: str, layout: Layout) -> list[dict[str, str]]:
    """Alpaca's columns as messages, with the input below its instruction, as LLaMA-Factory makes them."""
    asked = [_text(cells, "prompt", layout), _text_or_none(cells, "input", layout)]
    system = _text_or_none(cells, "system", layout)
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for question, answer in [*_history(cells, layout), ("\n".join(filter(None, asked)), response)]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _text_or_none(cells: Mapping[str, Any], role: str, layout: Layout) -> str:
    """The text of a cell that may be missing; empty then."""
    return "" if cells.get(role) is None else _text(cells, role, layout)


def _history(cells: Mapping[str, Any], layout: Layout) -> list[tuple[str, str]]:
    """Instructions with their responses that came before.

    Raises:
        ValueError: the cell holds something else than pairs of texts.
    """
    history = [] if cells.get("history") in (None, "") else _list(cells["history"])
    pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn) for turn in history
    )
    if not pairs:
        held = cut(repr(history))
        raise ValueError(f"column {layout.columns['history']!r} holds {held} where pairs of two texts are needed")
    return [(asked, told) for asked, told in history]


def _list(value: Any) -> Any:
    """The list that a JSON text stands for; any other value as it is, to be refused by who needs a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return parse_exact(value)
    return value


def _instruction(prompt: str, response: str) -> Rendered:
    gap = "" if response[0].isspace() else " "
    text = prompt + gap + response
    return Rendered(text, ((len(prompt), len(text)),), closed=True)


def _continued(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A response right behind its prompt. Where it brings the end token along, no other is appended."""
    text = prompt + response
    ended = bool(tokenizer.eos_token) and response.endswith(tokenizer.eos_token)
    return Rendered(text, ((len(prompt), len(text)),), closed=not ended)


def _response(cells: Mapping[str, Any], role: str, layout: Layout) -> str:
    """What is learned of a row.

    Raises:
        ValueError: the cell holds no text.
        _MissingError: the cell is null, or has no character but blanks.
    """
    text = _text(cells, role, layout)
    if not text.strip():
        raise _MissingError(f"column {layout.columns[role]!r}, which is to be learned, is blank")
    return text


def _text(cells: Mapping[str, Any], role: str, layout: Layout) -> str:
    """The text of a cell. A whole number stands for its digits, since there is but one way to write it.

    Raises:
        ValueError: the cell holds no text.
        _MissingError: the cell is null.
    """
    value, column = cells[role], layout.columns[role]
    if value is None:
        raise _MissingError(f"column {column!r} is null")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"column {column!r} holds {cut(repr(value))} where text is needed")
    return str(value)


def _stored_tokens(cells: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A row that is stored as tokens. What its attention mask hides at either end is padding, and is taken away.

    Raises:
        ValueError: the tokens are no ids of this tokenizer, the labels are neither the token's id nor -100, or the mask
            hides something between two tokens.
        _MissingError: nothing is stored, or nothing of it is to be learned.
    """
    ids, labels, mask = (_list(cells.get(name)) for name in ("input_ids", "labels", "attention_mask"))
    if ids is None or labels is None:
        raise _MissingError(f"column {'input_ids' if ids is None else 'labels'!r} is null")
    given = {"input_ids": ids, "labels": labels} | ({} if mask is None else {"attention_mask": mask})
    for name, values in given.items():
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise ValueError(f"column {name!r} holds {cut(repr(values))} where a list of whole numbers is needed")
        if len(values) != len(ids):
            raise ValueError(f"column {name!r} has {len(values)} entries, 'input_ids' has {len(ids)}")
    mask = [1] * len(ids) if mask is None else mask
    shown = [place for place, seen in enumerate(mask) if seen]
    kept = slice(shown[0], shown[-1] + 1) if shown else slice(0)
    if len(shown) != len(ids[kept]):
        raise ValueError("column 'attention_mask' hides tokens between others")
    ids, labels = ids[kept], labels[kept]
    if wrong := [token for token in ids if not 0 <= token < len(tokenizer)]:
        raise ValueError(f"column 'input_ids' holds {wrong[0]}; the tokenizer has the ids 0 to {len(tokenizer) - 1}")
    if wrong := [place for place, label in enumerate(labels) if label not in (ids[place], IGNORED)]:
        raise ValueError(
            f"column 'labels' holds {labels[wrong[0]]} at place {wrong[0] + 1}, where token {ids[wrong[0]]} stands; a "
            f"label is the token's own id, or {IGNORED} where it is not learned"
        )
    if all(label == IGNORED for label in labels[1:]):
        raise _MissingError("no token of it is to be learned")
    return Rendered("", (), closed=False, tokens=(ids, labels))
