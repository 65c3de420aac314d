"""From the shapes in which people store conversations to the messages that chat templates take.

Understood are `messages` (role, content), ShareGPT's `conversations` (from, value), and `prompt` and `completion` where
they hold messages; the list may be stored as JSON text. Whatever cannot be passed on as it is written is refused.
Messages are counted from 1 in what users read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sorsa_ds.data.tools import COLUMNS as TOOLS
from sorsa_ds.data.tools import calls_of, lost_by, tools_of
from sorsa_ds.runtime.json_text import parse_exact
from sorsa_ds.runtime.words import cut

Messages = Sequence[Mapping[str, Any]]

Learn = Literal["all", "last"]
"""Which assistant turns are learned."""

COLUMNS = ("messages", "conversations")
"""The columns of which each holds a whole conversation."""

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""The columns, and fields of messages, of pictures, sound and films to which prompts refer."""

_UNUSED = (*MEDIA, "documents", "chat_template_kwargs")

BESIDE = ("system", *TOOLS, *_UNUSED)
"""The columns beside a conversation that belong to it: they are read, or refused where they are not empty."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message's reasoning is stored."""

_SPEAKERS = {
    "system": "system", "developer": "developer", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant", "tool": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""The role of each speaker that ShareGPT's `from` names."""

_OPENS_A_MESSAGE = re.compile(rf'\s*\[\s*\{{\s*"(?:role|from)"\s*:\s*"(?:{"|".join(_SPEAKERS)})"')
"""The beginning of a list of messages as JSON text."""

_CALLS = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")
_CALL_FIELDS = ("tool_calls", "function_call")
_SAID = {"content", "tool_calls", "function_call", *REASONING}
_OURS = ("train", "weight", *REASONING)  # not handed on to the template as they are

EMPTY_TURN = "an assistant turn is empty, and not learned"
UNANSWERED = "what follows the last answer is left out"


class Conversation(NamedTuple):
    """A conversation up to its last answer, or the whole of one that is left out.

    messages: the messages as chat templates take them; reasoning is always `reasoning_content`.
    learned: the positions, from 0, of the assistant turns to learn.
    tools: the schemas of the tools that may be called; None where there are none.
    left_out: why nothing of it is learned; empty where something is.
    remarks: what of the row is not learned, in words by which rows are counted.
    """

    messages: Messages = ()
    learned: tuple[int, ...] = ()
    tools: list[dict[str, Any]] | None = None
    left_out: str = ""
    remarks: tuple[str, ...] = ()


def conversation_of(row: Mapping[str, Any], learn: Learn = "all") -> Conversation:
    """The conversation of a row, with the turns to learn: those with content that `train` or `weight` do not exclude.

    Raises:
        ValueError: the row holds no conversation, or something in it that cannot be passed on as it is written.
    """
    for column in _UNUSED:
        if row.get(column):
            raise ValueError(
                f"column {column!r} holds {cut(repr(row[column]))}, which is not used: only text is learned"
            )
    entries, given = _entries(row)
    if not entries:
        return Conversation(left_out="no message")
    messages, wanted = _messages(entries, given, row.get("system"))
    null = next((m["role"] for m in messages if m["role"] != "assistant" and m.get("content") is None), None)
    if null is not None:
        return Conversation(tuple(messages), left_out=f"a {null} message is null")
    if messages[0]["role"] == "assistant":
        raise ValueError(f"the conversation starts with the assistant: {cut(repr(entries[0]))} answers no prompt")
    found = _up_to_the_last_answer(messages, wanted, tools_of(row), learn)
    calls = [entry.get(name) for entry in entries for name in (*_CALL_FIELDS, "value")]
    lost = [] if found.left_out else sorted(lost_by([*calls, *(row.get(column) for column in TOOLS)]))
    return found._replace(remarks=(*found.remarks, *lost))


def _up_to_the_last_answer(
    messages: list[dict[str, Any]], wanted: list[bool], tools: list[dict[str, Any]] | None, learn: Learn
) -> Conversation:
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    full = [number for number in turns if not _is_empty(messages[number])]
    if not full:
        return Conversation(tuple(messages), left_out="an empty response" if turns else "no assistant turn")
    remarks = [EMPTY_TURN] if len(full) < len(turns) else []
    if full[-1] < len(messages) - 1:
        remarks.append(UNANSWERED)
    learned = tuple(number for number in full[-1 if learn == "last" else 0 :] if wanted[number])
    if not learned:
        return Conversation(tuple(messages), left_out="no turn to learn (train: false, weight: 0)")
    return Conversation(tuple(messages[: full[-1] + 1]), learned, tools, remarks=tuple(remarks))


def _entries(row: Mapping[str, Any]) -> tuple[list[Any], int]:
    """The stored messages, and how many of them are only the prompt of the others."""
    for column in COLUMNS:
        if column in row:
            return _list_of_messages(row[column], column), 0
    if "prompt" not in row or "completion" not in row:
        raise ValueError(f"no column {' or '.join(map(repr, COLUMNS))}: there is no conversation")
    prompt = _side(row["prompt"], "prompt", "user")
    completion = _side(row["completion"], "completion", "assistant")
    return [*prompt, *completion], len(prompt)


def holds_messages(value: Any) -> bool:
    """Whether a prompt or a completion is a list of messages, or the JSON text of one, be it sound or not."""
    if not isinstance(value, str):
        return isinstance(value, list)
    if not value.lstrip().startswith("["):
        return False
    try:
        entries = parse_exact(value)
    except ValueError:
        return _OPENS_A_MESSAGE.match(value) is not None
    return isinstance(entries, list) and bool(entries) and all(map(_is_message, entries))


def _is_message(entry: Any) -> bool:
    """Whether a value is a message for sure: JSON with a `role` may be a text to learn as well."""
    if not isinstance(entry, Mapping):
        return False
    said = entry.keys() & (_SAID if "role" in entry else {"value", "content"})
    return bool(said) and entry.get("role", entry.get("from")) in (*_SPEAKERS,)


def _side(value: Any, column: str, role: str) -> list[Any]:
    if isinstance(value, str) and not holds_messages(value) and value.strip() != "[]":
        return [{"role": role, "content": value}]
    return _list_of_messages(value, column)


def _list_of_messages(value: Any, column: str) -> list[Any]:
    stored = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_exact(value)
        except ValueError as error:
            raise ValueError(
                f"column {column!r} holds {cut(repr(stored))} where a list of messages is needed ({error})"
            ) from error
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"column {column!r} holds {cut(repr(stored))} where a list of messages is needed")
    return list(value)


def _messages(entries: list[Any], given: int, system: Any) -> tuple[list[dict[str, Any]], list[bool]]:
    """All messages, and for each whether it may be learned."""
    found = [_message(entry, number) for number, entry in enumerate(entries, 1)]
    wanted = [
        number >= given and _wanted(entry, message["role"], number + 1)
        for number, (entry, message) in enumerate(zip(entries, found, strict=True))
    ]
    if isinstance(system, str) and system.strip():
        if found[0]["role"] == "system":
            raise ValueError("column 'system' stands beside a conversation that has a system message of its own")
        return [{"role": "system", "content": system}, *found], [False, *wanted]
    if system is not None and not isinstance(system, str):
        raise ValueError(f"column 'system' holds {cut(repr(system))} where text is needed")
    return found, wanted


def _message(entry: Any, number: int) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"message {number} is {cut(repr(entry))} where a role and a content are needed")
    fields = {name: value for name, value in entry.items() if value is not None}
    if "role" not in fields and "from" in fields:
        fields = _of_sharegpt(fields, number)
    if not isinstance(fields.get("role"), str) or not _SAID & (entry.keys() | fields.keys()):
        raise ValueError(f"message {number} is {cut(repr(entry))} where a role and a content are needed")
    if fields.get("refusal"):
        raise ValueError(f"message {number} has a refusal, which no chat template shows; write it as the content")
    for name in MEDIA:
        if fields.get(name):
            raise ValueError(f"message {number} has {name}, which cannot be learned: only text can")
    content, thought = _content(fields.get("content"), number)
    thought = _thought([thought, *(fields.get(name) for name in REASONING)], number)
    message = {name: value for name, value in fields.items() if name not in _OURS}
    given = [value for value in (message.pop(name, None) for name in _CALL_FIELDS) if value]
    if len(given) > 1:
        raise ValueError(f"message {number} has both tool_calls and function_call; keep one of them")
    calls = given[0] if given else None
    if fields["role"] != "assistant" and (calls or thought):
        what = "calls of tools" if calls else "reasoning"
        raise ValueError(f"message {number} ({cut(fields['role'])}) has {what}, which only the assistant can have")
    if content is None and fields["role"] == "assistant" and not calls:
        content = ""  # most templates fail at a message without content, unless it calls tools
    if content is not None:
        message["content"] = content
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls_of(calls, number)
    return message


def _thought(found: list[Any], number: int) -> str | None:
    """The reasoning of a message, which may be stored in several places as long as they agree."""
    given = [thought for thought in found if thought]
    if wrong := [thought for thought in given if not isinstance(thought, str)]:
        raise ValueError(f"message {number} holds {cut(repr(wrong[0]))} as reasoning, which must be text")
    if other := [thought for thought in given if thought != given[0]]:
        told = f"{cut(repr(given[0]))} and {cut(repr(other[0]))}"
        raise ValueError(f"message {number} holds two different texts as reasoning, {told}; keep one of them")
    return given[0] if given else None


def _of_sharegpt(fields: dict[str, Any], number: int) -> dict[str, Any]:
    speaker = fields.pop("from")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise ValueError(f"message {number} is from {cut(repr(speaker))}; known are {', '.join(_SPEAKERS)}")
    role, value = _SPEAKERS[speaker], fields.pop("value", None)
    content = fields.pop("content", value)
    if value is not None and content != value:
        raise ValueError(f"message {number} has both a value and a content, which differ; keep one of them")
    value = content
    if speaker in _CALLS:
        return {**fields, "role": role, "tool_calls": value}
    return {**fields, "role": role, "content": value}


def _content(content: Any, number: int) -> tuple[str | None, str | None]:
    """The text of a message, and the reasoning that is stored among its parts."""
    if content is None or isinstance(content, str):
        return content, None
    if not isinstance(content, Sequence):
        raise ValueError(f"message {number} holds {cut(repr(content))} where text is needed")
    texts, thoughts = [], []
    for part in content:
        fields = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = fields.get("type") if isinstance(fields, Mapping) else None
        if kind in _TEXT_PARTS and isinstance(fields.get("text"), str):
            texts.append(fields["text"])
        elif kind in _THOUGHT_PARTS and isinstance(fields.get(kind), str):
            thoughts.append(fields[kind])
        else:
            raise ValueError(f"message {number} has the part {cut(repr(part))}, which cannot be learned: only text can")
    return "".join(texts), "\n".join(thoughts) or None


def _wanted(entry: Mapping[str, Any], role: str, number: int) -> bool:
    """Whether the row lets this turn be learned.

    Raises:
        ValueError: `train` or `weight` says something else than yes or no.
    """
    train, weight = entry.get("train"), entry.get("weight")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"message {number} has train: {cut(repr(train))}; it is true or false")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"message {number} has weight: {cut(repr(weight))}; a turn is learned (1) or not (0)")
    if train and role != "assistant":
        raise ValueError(f"message {number} has train: true; only turns of the assistant can be learned")
    return train is not False and weight != 0


def _is_empty(message: Mapping[str, Any]) -> bool:
    said = (message.get("content") or "").strip() or message.get("reasoning_content", "").strip()
    return not said and not message.get("tool_calls")
