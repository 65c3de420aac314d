"""Which chat template a tokenizer uses, and what is known of it: its markers, and TRL's training template for it.

TRL carries the templates of some thirty families, and for most a *marked twin*: the same template with
`{% generation %}` around what the assistant writes, so that its turns can be told apart. TRL's own
`get_training_chat_template` finds the twin by the template's text as well, but runs the template in this process to
see what it does; templates are foreign programs, so the files are read here instead.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sorsa_ds.runtime.words import cut

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TRAINING = "_training"
_OWNER = "sorsa_ds_owner_of_template"
"""The attribute of a tokenizer that says which request its template came from; it is sent to workers with it."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A template that marks what the assistant writes.

    name: TRL's name of the twin; empty where it is the tokenizer's own template.
    """

    text: str
    name: str = ""


@cache
def marked_template(template: str) -> Marked | None:
    """The template itself where it has markers, else TRL's marked twin of it, else None."""
    if _MARKER.search(template):
        return Marked(template)
    for name, text in trl_templates().items():
        if text.strip() == template.strip() and (twin := _templates_of_trl().get(name + _TRAINING)) is not None:
            return Marked(twin, name)
    return None


def told_by(template: str) -> str:
    """How the assistant's turns are told apart under a template, in a few words."""
    marked = marked_template(template)
    if marked is None:
        return "by where each turn begins and ends in the model's own template, which has no {% generation %} markers"
    if marked.name:
        return f"by TRL's training template for {marked.name}"
    return "by the {% generation %} markers of the model's own template"


def trl_templates() -> dict[str, str]:
    """The chat templates that models ship, as far as the installed TRL carries them, by TRL's names for them."""
    return {name: text for name, text in _templates_of_trl().items() if not name.endswith(_TRAINING)}


def use_template(tokenizer: PreTrainedTokenizerBase, request: str) -> None:
    """Give a tokenizer the chat template that `data.chat_template` asks for.

    Args:
        request: a file; or a name: of one of the tokenizer's own templates, or of one that TRL carries.

    Raises:
        ValueError: there is no such file and no such name, or the file is empty or no text.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    known = {**trl_templates(), **own}
    if (file := _file(request)) is not None:
        try:
            template = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template: {file} cannot be read: {error}") from error
        if not template.strip():
            raise ValueError(f"data.chat_template: {file} is empty")
        tokenizer.chat_template = template
    elif request in known:
        tokenizer.chat_template = known[request]
    else:
        raise ValueError(
            f"data.chat_template: {cut(request)!r} is neither a file nor one of the names {', '.join(sorted(known))}"
        )
    setattr(tokenizer, _OWNER, f"data.chat_template ({request})")


def owner_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose the template is that a tokenizer uses, for error messages."""
    return getattr(tokenizer, _OWNER, f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}")


def writes_the_date(template: str) -> bool:
    """Whether a template asks for the time, so that what it writes may differ from day to day."""
    return "strftime_now(" in template


def _file(request: str) -> Path | None:
    """The file of that name; None where there is none, and where no file could have such a name."""
    try:
        file = Path(request).expanduser()
        return file if file.is_file() else None
    except (OSError, RuntimeError, ValueError):  # a template in place of its name is too long for one; an unknown ~user
        return None


@cache
def _templates_of_trl() -> dict[str, str]:
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None, "trl is a dependency"
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {path.stem: path.read_text(encoding="utf-8") for path in files}
