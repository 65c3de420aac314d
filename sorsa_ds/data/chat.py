"""Conversations in the tokenizer's own chat template, and which of their characters the assistant has to learn."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sorsa_ds.runtime.line_process import LineProcess
from sorsa_ds.runtime.words import cut

Message = Mapping[str, Any]

SECONDS = 10.0
"""How long a template may take to render a conversation, which should take it a millisecond."""

_MEMORY = 2**30
_process = LineProcess("sorsa_ds.data.chat_process", seconds=SECONDS, memory=_MEMORY)


def end_rendering() -> None:
    """End the child process that renders templates; the next conversation starts another."""
    _process.end()


def render_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, tuple[tuple[int, int], ...], bool]:
    """Render a conversation up to the end of its last assistant turn.

    Every assistant turn is learned from behind the generation prompt to the end of its end-of-turn token; the
    whitespace that a template puts behind that token is not learned.

    Returns:
        (text, learned character spans, closed); `closed` is True where the template ends a turn without a special
        token, so that the tokenizer's end token has to be appended.

    Raises:
        ValueError: the tokenizer has no template; the messages are not a list of messages; the template refuses them,
            fails, or takes too much time or memory; the conversation starts with the assistant; or the template
            rewrites earlier messages, so that the beginning of a conversation is not the beginning of its text.
    """
    _check_template(tokenizer)
    _check_messages(messages)
    learned: list[tuple[int, int]] = []
    text = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = _render(tokenizer, messages[: turn + 1], (turn, True), (turn + 1, False))
        answered = answered.rstrip()
        if not prompt.startswith(text) or not answered.startswith(prompt):
            raise ValueError(
                f"the chat template rewrites what came before message {turn + 1}, so a turn's place in the text "
                "cannot be known; use a template that only appends, or rows with one assistant turn"
            )
        learned.append((len(prompt), len(answered)))
        text = answered
    return text, tuple(learned), bool(text) and not text.endswith(_special_tokens(tokenizer))


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a conversation that ends with the user, up to where the assistant answers.

    Raises:
        ValueError: the tokenizer has no template; or the template refuses the conversation, fails, or takes too much
            time or memory.
    """
    _check_template(tokenizer)
    return _render(tokenizer, messages, (len(messages), True))[0]


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError("chat needs a tokenizer with a chat template, and the tokenizer of this model has none")


def _check_messages(messages: Sequence[Message]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"column 'messages' holds {cut(repr(messages))} where a list of messages is needed")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"column 'messages' holds {cut(repr(message))} where a role and a content are needed")
        if not isinstance(message["role"], str) or not _is_content(message):
            raise ValueError(f"column 'messages' holds {cut(repr(message))}, whose role and content must be text")
    if messages[0]["role"] == "assistant":
        raise ValueError("column 'messages' starts with the assistant: there is no prompt to answer")


def _is_content(message: Message) -> bool:
    """Whether the content is text, or nothing beside calls of tools: a template would print anything else as it is."""
    content = message["content"]
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *beginnings: tuple[int, bool]
) -> list[str]:
    """The texts that `tokenizer.apply_chat_template` makes, made in the child process and under its limits.

    Args:
        beginnings: for each text, how many of the messages it has, and whether the prompt for an answer follows them.
    """
    question = {
        "template": tokenizer.get_chat_template(),
        "tokens": tokenizer.special_tokens_map,
        # Storage by columns gives every message every field; apply_chat_template leaves out those without a value too.
        "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
        "beginnings": beginnings,
    }
    whose = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    try:
        told = _process.ask(question)
    except TimeoutError:
        raise ValueError(f"{whose} does not come to an end: it was stopped after {SECONDS:g} s") from None
    except ChildProcessError as error:
        raise ValueError(f"{whose} ended its process, most likely for want of memory ({error})") from None
    if "fault" in told:
        raise ValueError(f"{whose} {told['fault']}")
    return told["texts"]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
