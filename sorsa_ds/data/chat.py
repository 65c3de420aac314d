"""Conversations in the tokenizer's own chat template, and which of their characters the assistant has to learn.

A template turns messages into one text and does not say which characters are the assistant's. There are three ways to
know, tried in this order: the template marks them itself; TRL has a marked twin of it; or the turns are told by where
the text of each beginning of the conversation ends. Whichever way is taken, a turn is learned from behind the prompt
for it to the end of its end token, and every line of the row has to have a place of its own in the text.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data import template_process
from sorsa_ds.data.chat_templates import marked_template, told_by, writes_the_date
from sorsa_ds.data.conversations import Conversation, Learn, Messages, conversation_of
from sorsa_ds.data.template_process import Template, TemplateFails, shows_name
from sorsa_ds.data.tools import with_text_arguments
from sorsa_ds.data.turns import (
    Place,
    Span,
    Turn,
    closes_thought,
    ends_with_special,
    missing_part,
    missing_parts,
    place_turn,
    special_pattern,
)

OPENED = "the template's prompt for an answer opens a thought, and the answer has none: serve it with thinking off"
CLOSED = "the template's prompt for an answer has an empty thought, and the answer has one: serve it with thinking on"
KEPT = "earlier turns keep their thoughts, as in TRL's training template; the model's own template drops them"
FORGOTTEN = "the template drops the reasoning of a turn that is not learned"
NAMELESS = "the template does not show the name of a message"
DATED = "the template asks for today's date, so tokens that are made on another day may be others"
ENDLESS = "a turn before the last has no end token in this template"

HEADED = "the template writes more before a turn than the prompt with which it asks for one"

_ROLES = ("system", "developer", "user", "assistant", "tool")


class RenderedChat(NamedTuple):
    """A conversation before tokenisation; the fields are those of `sorsa_ds.data.formats.Rendered`."""

    text: str
    learned: tuple[Span, ...] = ()
    closed: bool = False
    bare: bool = True
    left_out: str = ""
    remarks: tuple[str, ...] = ()


class _Reading(NamedTuple):
    """A conversation as one template writes it, with the place of each learned turn."""

    text: str
    places: tuple[Place, ...]
    remarks: tuple[str, ...]


def end_rendering() -> None:
    """End the child process that renders templates; the next conversation starts another."""
    template_process.end()


def describe_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the assistant's turns are told apart under the tokenizer's template, in a few words.

    Raises:
        ValueError: the tokenizer has no template.
    """
    return told_by(Template.of(tokenizer).text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any of a tokenizer's special tokens. To make it takes milliseconds, where a row takes tenths of one."""
    return special_pattern([token.content for token in tokenizer.added_tokens_decoder.values() if token.special])


def render_chat(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    learn: Learn = "all",
    special: re.Pattern[str] | None = None,
) -> RenderedChat:
    """Render the conversation of a row up to the end of its last answer.

    The text is `bare`: serving adds no special tokens around what a template writes, so training must not either.
    `closed` is true where the template ends a turn without a special token, so that the end token has to be appended.

    Args:
        special: `special_tokens` of the tokenizer, for callers with many rows.

    Raises:
        ValueError: the tokenizer has no template; the row holds something that cannot be passed on; the template
            refuses the conversation, leaves out a part of it, fails, or takes too much time or memory; or it rewrites
            earlier messages, so that the place of a turn cannot be known.
    """
    conversation = conversation_of(row, learn)
    template = Template.of(tokenizer, conversation.tools)
    _check_roles(conversation.messages, template.text)
    if conversation.left_out:
        return RenderedChat("", left_out=conversation.left_out)
    special = special or special_tokens(tokenizer)
    reading = _first_right(partial(_reading, spelt, template, special) for spelt in _spellings(conversation))
    learned = tuple(span for place in reading.places for span in place.spans)
    closed = not ends_with_special(reading.text, special)
    remarks = dict.fromkeys((*conversation.remarks, *reading.remarks))
    if any(not ends_with_special(reading.text[: place.end], special) for place in reading.places[:-1]):
        remarks[ENDLESS] = None
    if writes_the_date(template.text):
        remarks[DATED] = None
    # A last turn that is not learned, because the row says so, does not get an end token either.
    last_is_learned = bool(learned) and learned[-1][1] == len(reading.text)
    return RenderedChat(reading.text, learned, closed and last_is_learned, remarks=tuple(remarks))


def render_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a conversation that ends with the user, up to where the assistant answers.

    Raises:
        ValueError: the tokenizer has no template; or the template refuses the conversation, fails, or takes too much
            time or memory.
    """
    return Template.of(tokenizer).render(messages, None, [(len(messages), True)])[0][0]


def _check_roles(messages: Messages, template: str) -> None:
    answers = any(message["role"] == "assistant" for message in messages)
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role in _ROLES:
            continue
        if not re.search(rf"""(['"]){re.escape(role)}\1""", template):
            raise ValueError(f"message {number} has the role {role!r}, which no template knows: {', '.join(_ROLES)}")
        if not answers:
            raise ValueError(
                f"message {number} has the role {role!r}, and none is the assistant's, whose turns are learned"
            )


def _spellings(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation in the ways of writing calls of tools among which templates differ.

    A call may have no content or an empty one, and its arguments may be an object or JSON text.
    """
    yield conversation
    messages = conversation.messages
    if any(message.get("tool_calls") for message in messages):
        yield conversation._replace(messages=with_text_arguments(messages))
        messages = [{"content": "", **message} for message in messages]
        yield conversation._replace(messages=messages)
        yield conversation._replace(messages=with_text_arguments(messages))


def _first_right(ways: Iterable[Callable[[], _Reading]]) -> _Reading:
    """The reading of the first way that has no error.

    Raises:
        ValueError: no way reads the conversation. It is the last error, but rather one of a template that understood
            the conversation than one of a template that failed.
    """
    errors: list[ValueError] = []
    for way in ways:
        try:
            return way()
        except ValueError as error:
            errors.append(error)
    raise next((error for error in reversed(errors) if not isinstance(error, TemplateFails)), errors[-1])


def _reading(conversation: Conversation, template: Template, special: re.Pattern[str]) -> _Reading:
    """The conversation as it is learned, in the first of the three ways that is right for it."""
    marked = marked_template(template.text)
    by_beginnings = partial(_read, conversation, template, False, special)
    if marked is None:
        return by_beginnings()
    if not marked.name:
        return _first_right([partial(_read, conversation, template, True, special), by_beginnings])
    twin = template.with_text(marked.text)
    alike = partial(_read_alike, conversation, template, twin, special)
    keeping = partial(_read_keeping, conversation, template, twin, special)
    if conversation.learned == (len(conversation.messages) - 1,):
        # Nothing before the only turn is learned, so that may be written as the model is served with it.
        return _first_right([alike, by_beginnings, keeping])
    return _first_right([alike, keeping, by_beginnings])


def _read_alike(conversation: Conversation, template: Template, twin: Template, special: re.Pattern[str]) -> _Reading:
    """In the twin, which writes what the model's own template writes, perhaps with an end token behind the last turn.

    Raises:
        ValueError: the twin writes something else.
    """
    reading = _read(conversation, twin, True, special)
    (whole,), _ = template.render(conversation.messages, conversation.tools, [(len(conversation.messages), False)])
    whole = whole.rstrip()
    if not reading.text.startswith(whole) or special.sub("", reading.text[len(whole) :]).strip():
        raise ValueError("TRL's training template writes this conversation otherwise than the model's own")
    return reading


def _read_keeping(conversation: Conversation, template: Template, twin: Template, special: re.Pattern[str]) -> _Reading:
    """In the twin, where it differs only in keeping what the model's own template drops from turns.

    Raises:
        ValueError: a turn reads otherwise in the model's own template when it is the newest, though nothing is dropped.
    """
    reading = _read(conversation, twin, True, special)
    for turn, place in zip(_turns(conversation, template), reading.places, strict=True):
        message, newest = conversation.messages[turn.number], place_turn(turn.answered.rstrip(), turn, None, special)
        own = turn.answered[newest.begin : newest.end]
        if own != reading.text[place.begin : place.end] and missing_part(message, own) is None:
            raise ValueError("TRL's training template writes a turn otherwise than the model's own")
    return reading._replace(remarks=(*reading.remarks, KEPT))


def _turns(conversation: Conversation, template: Template) -> list[Turn]:
    beginnings = [one for number in conversation.learned for one in ((number, True), (number + 1, False))]
    texts, _ = template.render(conversation.messages, conversation.tools, beginnings)
    return [Turn(*turn) for turn in zip(conversation.learned, texts[::2], texts[1::2], strict=True)]


def _read(conversation: Conversation, template: Template, marked: bool, special: re.Pattern[str]) -> _Reading:
    """The conversation in one template, by its markers or by where its beginnings end.

    Raises:
        ValueError: the template fails, leaves out a part of the row, or rewrites turns.
    """
    messages, tools = conversation.messages, conversation.tools
    (whole,), (marks,) = template.render(messages, tools, [(len(messages), False)], marked)
    text = whole.rstrip()
    places = tuple(
        place_turn(text, turn, marks if marked else None, special) for turn in _turns(conversation, template)
    )
    if tools and template.render(messages, None, [(len(messages), False)])[0][0] == whole:
        raise ValueError("the chat template has no place for tools, so the row's tools would be lost")
    remarks = [CLOSED if closes_thought(place.unused) else OPENED for place in places if place.unused]
    remarks += [HEADED for place in places if text[place.start : place.spans[0][0]].strip()]
    if any(message.get("name") and not shows_name(template, message["role"]) for message in messages):
        remarks.append(NAMELESS)
    for number, missing in _missing(conversation, text, places):
        if missing == "reasoning" and number not in conversation.learned:
            remarks.append(FORGOTTEN)
        else:
            role = messages[number]["role"]
            raise ValueError(f"the chat template leaves out the {missing} of message {number + 1} ({role})")
    return _Reading(text, places, tuple(remarks))


def _missing(conversation: Conversation, text: str, places: Sequence[Place]) -> Iterator[tuple[int, str]]:
    """The positions of messages with what the text does not show of them, for learned turns in their places."""
    others = [number for number in range(len(conversation.messages)) if number not in conversation.learned]
    rest = text
    for number, place in zip(conversation.learned, places, strict=True):
        if missing := missing_part(conversation.messages[number], text[place.begin : place.end]):
            yield number, missing
        rest = rest[: place.begin] + " " * (place.end - place.begin) + rest[place.end :]
    parts = missing_parts([conversation.messages[number] for number in others], rest)
    yield from ((number, missing) for number, found in zip(others, parts, strict=True) for missing in sorted(found))
