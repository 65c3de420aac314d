"""A tokenizer's chat template, run in a child process (`sorsa_ds.data.chat_process`) with limits of time and memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.chat_templates import owner_of
from sorsa_ds.data.conversations import Messages
from sorsa_ds.data.turns import Span
from sorsa_ds.runtime.line_process import LineProcess

SECONDS = 10.0
"""How long a template may take to render the beginnings of a conversation, which should take it milliseconds."""

Beginning = tuple[int, bool]
"""How many messages of a conversation, and whether the prompt for an answer follows them."""

_MEMORY = 2**30
_PROBE = ("sorsa-ds-question", "sorsa-ds-answer")
_process = LineProcess("sorsa_ds.data.chat_process", seconds=SECONDS, memory=_MEMORY)


class TemplateFails(ValueError):
    """A template came upon an error, rather than refusing a conversation in its own words."""


def end() -> None:
    """End the child process; the next question starts another."""
    _process.end()


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template with the special tokens that it may write.

    text: the template's text.
    tokens: the special tokens by name, as pairs.
    owner: the words that name the template in error messages.
    """

    text: str
    tokens: tuple[tuple[str, str], ...]
    owner: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None = None) -> "Template":
        """The template that the tokenizer uses for a conversation with these tools.

        Raises:
            ValueError: the tokenizer has no template, or several of which none is the default.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                "chat needs a tokenizer with a chat template, and the tokenizer of this model has none; name one: "
                "data.chat_template"
            )
        tokens = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
        return cls(tokenizer.get_chat_template(tools=tools), tokens, owner_of(tokenizer))

    def with_text(self, text: str) -> "Template":
        """Another template with the same special tokens."""
        return replace(self, text=text)

    def render(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None,
        beginnings: Sequence[Beginning],
        marked: bool = False,
    ) -> tuple[list[str], list[list[Span]]]:
        """The texts that `apply_chat_template` makes of beginnings of a conversation, and what is marked in each.

        Args:
            marked: whether the template marks what the assistant writes; without it no marks are returned.

        Raises:
            ValueError: the template refuses the conversation, fails, or takes too much time or memory.
        """
        messages = _in_parts(messages) if _takes_parts(self) else messages
        told = self._ask(messages, tools, beginnings, marked)
        if "fault" in told:
            fault = told["fault"]
            raise (TemplateFails if fault.startswith("fails") else ValueError)(f"{self.owner} {fault}")
        return told["texts"], [[(start, end) for start, end in spans] for spans in told["marks"]]

    def _ask(
        self, messages: Messages, tools: list[dict[str, Any]] | None, beginnings: Sequence[Beginning], marked: bool
    ) -> dict[str, Any]:
        question = {
            "template": self.text,
            "tokens": dict(self.tokens),
            # Storage by columns gives every message every field; apply_chat_template leaves out empty ones too.
            "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
            "tools": tools,
            "beginnings": beginnings,
            "marked": marked,
        }
        try:
            return _process.ask(question)
        except TimeoutError:
            raise ValueError(f"{self.owner} does not come to an end: it was stopped after {SECONDS:g} s") from None
        except ChildProcessError as error:
            raise ValueError(f"{self.owner} ended its process, most likely for want of memory ({error})") from None


@cache
def shows_name(template: Template, role: str) -> bool:
    """Whether a template writes the `name` that a message of a role has, tried with a short conversation."""
    question, answer = _PROBE
    asked: dict[str, Any] = {"role": "user", "content": question}
    named: dict[str, Any] = {"role": role, "content": "sorsa-ds-content", "name": "sorsa_ds_name"}
    told: dict[str, Any] = {"role": "assistant", "content": answer}
    call = {"type": "function", "function": {"name": "sorsa_ds_tool", "arguments": {}}}
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    conversations = {"user": [named, told], "assistant": [asked, named], "tool": [asked, calling, named, told]}
    messages = conversations.get(role, [named, asked, told])
    try:
        return named["name"] in template.render(messages, None, [(len(messages), False)])[0][0]
    except ValueError:
        return False


@cache
def _takes_parts(template: Template) -> bool:
    """Whether a template shows text only as a list of parts, as templates of models that see images may."""
    question, answer = _PROBE
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def shown(messages: Messages) -> bool:
        told = template._ask(messages, None, [(2, False)], False)
        text = told["texts"][0] if "texts" in told else ""
        return question in text and answer in text and "'type'" not in text  # a list that is printed shows no text

    return not shown(messages) and shown(_in_parts(messages))


def _in_parts(messages: Messages) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str) else dict(message)
        for message in messages
    ]  # fmt: skip
