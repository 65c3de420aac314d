"""The child process of `sorsa_ds.data.chat`, in which chat templates are rendered.

A template is a program that comes with a model or with an adapter. Jinja's sandbox keeps it from files and from the
network, but lets it loop and allocate without end; the limits of `sorsa_ds.runtime.line_process` end that.
"""

import traceback
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from sorsa_ds.runtime.line_process import serve

MOST_CHARACTERS = 2**24
"""The longest text that a template may make of a conversation: some four million tokens."""
_TOLD = 1000  # characters of an error


def render(question: dict[str, Any]) -> dict[str, Any]:
    """Render beginnings of a conversation.

    Args:
        question: `template`; `tokens`, the special tokens by name; `messages`; `tools`, a list or None; `marked`,
            whether the template marks what the assistant writes; and `beginnings`, a list of pairs: the number of
            messages, and whether the prompt for an answer follows them.

    Returns:
        `texts` and `marks`, one for each beginning, marks being the marked spans [start, end) of a text in characters;
        or `fault`, which says what the template did instead.
    """
    texts, marks = [], []
    for count, add_generation_prompt in question["beginnings"]:
        try:
            # Returns the texts and their spans, whatever its annotation says.
            told: Any = render_jinja_template(
                conversations=[question["messages"][:count]],
                tools=question["tools"],
                chat_template=question["template"],
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=question["marked"],
                **question["tokens"],
            )
        except Exception as error:  # an expression of a template can raise anything
            return {"fault": _fault(error)}
        (text,), spans = told
        if len(text) > MOST_CHARACTERS:
            return {"fault": f"makes a text of {len(text)} characters; at most {MOST_CHARACTERS} are allowed"}
        texts.append(text)
        marks.append(spans[0] if spans else [])
    return {"texts": texts, "marks": marks}


def _fault(error: Exception) -> str:
    told = str(error)[:_TOLD]
    if type(error) is TemplateError:  # what a template's own raise_exception raises
        return f"refuses the conversation: {told}"
    if isinstance(error, MemoryError):
        return "takes too much memory"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    place = "" if line is None else f", in its line {line}"
    return f"fails{place}: {type(error).__name__}: {told}"


if __name__ == "__main__":
    serve(render)
