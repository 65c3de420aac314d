"""How a question is put to a model, with examples before it; as token ids, made by the code that training uses.

`papers`: the layout of training (sorsa_ds.data.formats). `chat`: the tokenizer's chat template. `plain`: question and
answer under one another, for a model that was trained on neither.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.chat import render_prompt
from sorsa_ds.data.formats import Rendered, prompt_for
from sorsa_ds.data.tokenize import encode
from sorsa_ds.evaluate.options import Style

STEP_BY_STEP = " Let's think step by step."
"""With what the papers' evaluation of mathematics opens the response."""

_UNLIMITED = 2**31


@dataclass(frozen=True, slots=True)
class Shot:
    """A question with its answer, shown before the one that is asked."""

    question: str
    answer: str


def render(
    style: Style, tokenizer: PreTrainedTokenizerBase, question: str, shots: list[Shot], opening: str = "", ask: str = ""
) -> str:
    """The text that a model continues.

    Args:
        opening: what a response in the papers' layout begins with, put into its mouth.
        ask: what is wanted besides the answer, for a chat model that knows no layout.

    Raises:
        ValueError: style `chat` without a chat template.
    """
    if style == "papers":
        return "\n\n".join([f"{prompt_for(s.question)} {s.answer}" for s in shots] + [prompt_for(question) + opening])
    if style == "plain":
        before = [f"Question: {shot.question}\nAnswer: {shot.answer}" for shot in shots]
        return "\n\n".join([*before, f"Question: {question}\nAnswer:"])
    messages = []
    for shot in shots:
        messages += [{"role": "user", "content": shot.question + ask}, {"role": "assistant", "content": shot.answer}]
    return render_prompt([*messages, {"role": "user", "content": question + ask}], tokenizer)


def tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a prompt, exactly as training would have them.

    Raises:
        ValueError: the tokenizer cannot be used (sorsa_ds.data.tokenize).
    """
    return encode(Rendered(text, (), closed=False), tokenizer, _UNLIMITED)["input_ids"].tolist()
