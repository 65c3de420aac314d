"""Conversations in the tokenizer's own chat template: which characters of it the assistant has to learn."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]


def render_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, tuple[tuple[int, int], ...], bool]:
    """(text, learned spans, closed) of a conversation, up to the end of its last assistant turn.

    Every assistant turn is learned from behind the generation prompt to the end of its end-of-turn token; the
    whitespace that a template puts behind that token is not. `closed` is set where the template ends a turn without
    a special token.

    Raises:
        ValueError: no template; messages that are none, or that the template refuses; a conversation that starts
            with the assistant; a template under which the beginning of a conversation is not the beginning of its text.
    """
    _check_template(tokenizer)
    _check(messages)
    learned: list[tuple[int, int]] = []
    text = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:turn], add_generation_prompt=True)
        answered = _apply(tokenizer, messages[: turn + 1]).rstrip()
        if not prompt.startswith(text) or not answered.startswith(prompt):
            raise ValueError(
                f"the chat template rewrites what came before message {turn + 1}, so a turn's place in the text "
                "cannot be known; use a template that only appends, or rows with one assistant turn"
            )
        learned.append((len(prompt), len(answered)))
        text = answered
    return text, tuple(learned), bool(text) and not text.endswith(_special_tokens(tokenizer))


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation that ends with the user, up to where the assistant answers.

    Raises:
        ValueError: no template, or one that refuses the conversation.
    """
    _check_template(tokenizer)
    return _apply(tokenizer, messages, add_generation_prompt=True)


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError("chat needs a tokenizer with a chat template, and this model's has none")


def _check(messages: Sequence[Message]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"column 'messages' holds {messages!r} where a list of messages is needed")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"column 'messages' holds {message!r} where a role and a content are needed")
    if messages[0]["role"] == "assistant":
        raise ValueError("column 'messages' starts with the assistant: there is no prompt to answer")


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from error


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
