"""Where an assistant's turns lie in the text of a conversation, and whether the text shows all that they say.

A turn begins behind the prompt for it, which is what the model is given when it is served, and ends with the token that
ends it. The whitespace that a template puts behind that token belongs to no turn. Positions are characters.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

Span = tuple[int, int]

_OPENED = re.compile(r"(?:<think>\s*(?:</think>\s*)?|<\|channel>thought\s*(?:<channel\|>\s*)?)\Z")
"""The opening of a thought, closed again or not, at the end of a prompt for an answer."""


def closes_thought(opening: str) -> bool:
    """Whether a thought at the end of a prompt for an answer is closed again, and so is empty."""
    return "</think>" in opening or "<channel|>" in opening


class Turn(NamedTuple):
    """What a template makes of the messages before a turn with the prompt for it, and of those up to its end."""

    number: int
    prompt: str
    answered: str


class Place(NamedTuple):
    """Where a turn lies.

    begin: its start, or that of the thought which the prompt for it opens and with which it goes on.
    spans: what of it is to be learned; in a template without markers the whole turn.
    unused: the thought with which the prompt for it ends, opened or closed again, where the turn does not go on so.
    """

    begin: int
    start: int
    end: int
    spans: tuple[Span, ...]
    unused: str


def special_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of a tokenizer's special tokens; nothing where it has none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def ends_with_special(text: str, special: re.Pattern[str]) -> bool:
    """Whether the last thing in a text, apart from whitespace, is a special token."""
    text = text.rstrip()
    return any(found.end() == len(text) for found in special.finditer(text))


def place_turn(text: str, turn: Turn, marks: Sequence[Span] | None, special: re.Pattern[str]) -> Place:
    """Find a turn in the text of the whole conversation.

    Args:
        marks: what the template marks as written by the assistant; None for a template without markers.

    Raises:
        ValueError: the template writes the turn, or what comes before it, otherwise once more messages follow; or the
            turn is marked nowhere.
    """
    begin, start, unused = _start(text, turn)
    end = _end(text, turn, start, special)
    if marks is None:
        return Place(begin, start, end, ((start, end),), unused)
    spans = _clipped(text, marks, start, end)
    if not spans:
        raise ValueError(f"the chat template marks nothing of message {turn.number + 1} as the assistant's")
    last = spans[-1][1]
    if not ends_with_special(text[start:last], special) and not special.sub("", text[last:end]).strip():
        spans = (*spans[:-1], (spans[-1][0], end))  # the token that ends the turn stands behind its mark
    return Place(begin, start, end, spans, unused)


def _start(text: str, turn: Turn) -> tuple[int, int, str]:
    opening = _OPENED.search(turn.prompt)
    begin = len(turn.prompt) if opening is None else opening.start()
    if text.startswith(turn.prompt):
        return begin, len(turn.prompt), ""
    if opening is not None and text.startswith(turn.prompt[:begin]):
        return begin, begin, opening.group()
    raise ValueError(_rewritten(f"what came before message {turn.number + 1}, or the prompt for it"))


def _end(text: str, turn: Turn, start: int, special: re.Pattern[str]) -> int:
    alone = turn.answered.rstrip()
    if len(alone) < start or alone[:start] != text[:start]:
        raise ValueError(_rewritten(f"what came before message {turn.number + 1}"))
    if text.startswith(alone):
        return len(alone)
    shared = next((at for at, (one, other) in enumerate(zip(alone, text, strict=False)) if one != other), len(text))
    tokens = [found.span() for found in special.finditer(alone)]
    # Where the newest turn has one end token more, the turn ends behind the last one that both have.
    ends = [end for _, end in tokens if start < end <= shared and not special.sub("", alone[end:]).strip()]
    if ends:
        return ends[0]
    # Where the newest turn ends with another token, the turn ends with the one that the text has there.
    begins = [begin for begin, _ in tokens if start < begin <= shared and not special.sub("", alone[begin:]).strip()]
    other = special.match(text, begins[0]) if begins else None
    if other is None:
        raise ValueError(_rewritten(f"message {turn.number + 1} when more messages follow"))
    return other.end()


def _rewritten(what: str) -> str:
    return (
        f"the chat template rewrites {what}, so a turn's place in the text cannot be known; "
        f"use data.learn: last, or data.chat_template with a template that only appends"
    )


def _clipped(text: str, marks: Sequence[Span], start: int, end: int) -> tuple[Span, ...]:
    """The marked parts of text[start:end]; parts that touch are one, and whitespace behind the last belongs to none."""
    joined: list[Span] = []
    for begin, stop in sorted((max(begin, start), min(stop, end)) for begin, stop in marks):
        if begin >= stop:
            continue
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((begin, stop))
    if joined:
        begin, stop = joined[-1]
        joined[-1] = (begin, begin + len(text[begin:stop].rstrip()))
    return tuple(span for span in joined if span[0] < span[1])


def missing_part(message: Mapping[str, Any], text: str) -> str | None:
    """What of a message a text does not show, by its name; None where it shows everything."""
    return min(missing_parts([message], text)[0], key=_PARTS.index, default=None)


def missing_parts(messages: Sequence[Mapping[str, Any]], text: str) -> list[set[str]]:
    """What of each message a text does not show, by the names of the parts.

    A template may put text between lines, change the whitespace around them, and write values as JSON. Every piece has
    to have a place of its own in the text: a call is not shown by a sentence that happens to name the tool. So the
    longest pieces are looked for first, and what has been found is taken out of the text. A piece of several lines that
    does not stand in the text as a whole is looked for line by line.
    """
    pieces = [
        (-len(piece), _PARTS.index(part), at, piece)
        for at, message in enumerate(messages)
        for part, piece in _pieces(message)
    ]
    heapify(pieces)
    missing: list[set[str]] = [set() for _ in messages]
    while pieces:
        _, part, at, piece = heappop(pieces)
        spelt = next((spelt for spelt in _spellings(piece) if spelt in text), None)
        lines = [line.strip() for line in piece.splitlines() if line.strip()]
        if spelt is not None:
            text = text.replace(spelt, _TAKEN, 1)
        elif lines == [piece]:
            missing[at].add(_PARTS[part])
        else:
            for line in lines:
                heappush(pieces, (-len(line), part, at, line))
    return missing


_PARTS = ("content", "reasoning", "tool call")
_TAKEN = "\0"


def _pieces(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The texts of a message, each behind the name of the part that it belongs to."""
    yield "content", str(message.get("content") or "").strip()
    yield "reasoning", str(message.get("reasoning_content") or "").strip()
    for call in message.get("tool_calls") or []:
        function = call["function"]
        for leaf in (function["name"], *_leaves(function["arguments"])):
            yield "tool call", leaf.strip()


def _spellings(piece: str) -> Iterator[str]:
    """A piece as it is, and as JSON writes it."""
    yield piece
    yield json.dumps(piece, ensure_ascii=False)[1:-1]
    yield json.dumps(piece)[1:-1]


def _leaves(value: Any) -> Iterator[str]:
    """The names and values of arguments, as far as every template writes them alike."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield from value.splitlines()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
