"""How a question is put to a model, with examples before it; the token ids are made by the code that training uses.

`papers` is the layout of training (sorsa_ds.data.formats), `chat` the tokenizer's chat template, and `plain` writes
question and answer under one another, for a model that was trained on neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.chat import render_prompt
from sorsa_ds.data.formats import Rendered, prompt_for
from sorsa_ds.data.tokenize import encode
from sorsa_ds.evaluate.options import Style

STEP_BY_STEP = " Let's think step by step."
"""The first words of a response in the papers' evaluation of mathematics."""

_UNLIMITED = 2**31


@dataclass(frozen=True, slots=True)
class Shot:
    """A question with its answer, shown before the one that is asked."""

    question: str
    answer: str


def render_question(
    style: Style,
    tokenizer: PreTrainedTokenizerBase,
    id_: str,
    question: str,
    shots: list[Shot],
    opening: str = "",
    ask: str = "",
) -> str:
    """The text that a model continues.

    Args:
        id_: the question's id, for error messages.
        opening: what a response in the papers' layout begins with; the model goes on behind it.
        ask: an instruction on the form of the answer, for a chat model, which was not trained on a layout.

    Raises:
        ValueError: the style is `chat`, and the tokenizer has no chat template, or it fails with this question.
    """
    if style == "papers":
        return "\n\n".join([f"{prompt_for(s.question)} {s.answer}" for s in shots] + [prompt_for(question) + opening])
    if style == "plain":
        ask = ""
    history = [(shot.question + ask, shot.answer) for shot in shots]
    try:
        return render_conversation(style, tokenizer, question + ask, history)
    except ValueError as error:
        raise ValueError(f"--prompt {style}, question {id_}: {error}") from error


def render_conversation(
    style: Style, tokenizer: PreTrainedTokenizerBase, question: str, history: Sequence[tuple[str, str]]
) -> str:
    """The text that a model continues, where questions with their answers came before.

    Args:
        history: (question, answer), the earliest first.

    Raises:
        ValueError: the style is `chat`, and the tokenizer has no chat template, or it refuses this conversation.
    """
    if style == "papers":
        return prompt_for(question, history=history)
    if style == "plain":
        before = [f"Question: {asked}\nAnswer: {told}" for asked, told in history]
        return "\n\n".join([*before, f"Question: {question}\nAnswer:"])
    messages = []
    for asked, told in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return render_prompt([*messages, {"role": "user", "content": question}], tokenizer)


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase, bare: bool = False) -> list[int]:
    """The token ids of a prompt, exactly as training would make them.

    Args:
        bare: whether a chat template has made the text, with all the special tokens that it needs.

    Raises:
        ValueError: the tokenizer cannot be used (sorsa_ds.data.tokenize).
    """
    return encode(Rendered(text, (), closed=False, bare=bare), tokenizer, _UNLIMITED)["input_ids"].tolist()
