"""Which column of the data plays which role: by the names that published sets use, or as `data.columns` says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from sorsa_ds.config.mixing import WITH_PROMPT
from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.conversations import BESIDE, MEDIA, Learn
from sorsa_ds.data.conversations import COLUMNS as CONVERSATION
from sorsa_ds.data.prompt_template import PromptTemplate
from sorsa_ds.runtime.words import cut

FORMATS: Mapping[str, Mapping[str, str]] = {
    "chat": {"messages": "messages"},
    "tokens": {"input_ids": "input_ids", "labels": "labels"},
    "completion": {"prompt": "prompt", "response": "completion"},
    "alpaca": {"prompt": "instruction", "response": "output"},
    "metamath": {"prompt": "query", "response": "response"},
    "codefeedback": {"prompt": "query", "response": "answer"},
    "gsm8k": {"prompt": "question", "response": "answer"},
    "text": {"text": "text"},
    "alpaca_chat": {"prompt": "instruction", "response": "output"},
}
"""The roles that each format needs, and the columns that play them; `auto` takes the first whose columns are there."""

OPTIONAL: Mapping[str, Mapping[str, str]] = {
    "alpaca": {"input": "input", "system": "system", "history": "history"},
    "alpaca_chat": {"input": "input", "system": "system", "history": "history"},
    "tokens": {"attention_mask": "attention_mask"},
}
"""Roles that a row may leave empty, and a data set may lack."""

ALSO_CHAT = "conversations"
"""ShareGPT's name for the column of a conversation."""

TURNS = ("chat", "alpaca_chat")
"""The formats whose rows are turns in the tokenizer's chat template."""

INSTRUCTIONS = ("alpaca", "metamath", "codefeedback", "gsm8k")
"""The formats that are put into the papers' prompt. By `data.columns` each may have the roles of all."""

_CHANGES_MEANING = (
    "system", "system_prompt", "history", "context", "input", "passage", "documents", "choices", "options", "tools",
    "functions", *MEDIA,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a data set are read.

    format: one of FORMATS. columns: role -> column. prompt: the user's own, in place of the format's.
    learn: which turns of the assistant are learned in a conversation.
    refused: columns that would change what a row means, and that this format does not read. A row of `completion` that
    turns out to be a conversation does read those of `sorsa_ds.data.conversations.BESIDE`.
    ignored: the other columns that it does not read.
    """

    format: str
    columns: Mapping[str, str]
    prompt: PromptTemplate | None = None
    refused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    learn: Learn = "all"

    @property
    def kind(self) -> str:
        """How rows become texts, in words, where they are no conversations."""
        return self.format if self.prompt is None else f"{self.format}{WITH_PROMPT}"


def layout_of(data: DataConfig, columns: Sequence[str]) -> Layout:
    """The layout that a run's settings ask for; see `resolve_format`."""
    return replace(resolve_format(data.format, columns, data.columns, data.prompt), learn=data.learn)


def resolve_format(
    name: str, columns: Sequence[str], roles: Mapping[str, str] = MappingProxyType({}), prompt: str | None = None
) -> Layout:
    """The layout of data with these columns: `auto` goes by their names, any other format is checked against them.

    Args:
        name: `data.format`.
        roles: `data.columns`, role -> column.
        prompt: `data.prompt`.

    Raises:
        ValueError: a column is missing, no format fits, a role is not the format's, or the prompt is no template.
    """
    for role, column in roles.items():
        if column not in columns:
            raise ValueError(f"data.columns: {role} is to be {cut(column)!r}; there are {listed(columns)}")
    template = None if prompt is None else PromptTemplate(prompt)
    if template is not None and (unknown := [column for column in template.columns if column not in columns]):
        raise ValueError(f"data.prompt: it uses {listed(unknown)}; there are {listed(columns)}")
    if template is not None and name in ("auto", *INSTRUCTIONS, "completion"):
        return _with_prompt(name, columns, roles, template)
    format_ = _detected(columns, roles) if name == "auto" else name
    if template is not None:
        raise ValueError(f"data.prompt goes with a prompt and a response; data.format={format_} has none")
    return _layout(format_, columns, roles)


def _with_prompt(name: str, columns: Sequence[str], roles: Mapping[str, str], template: PromptTemplate) -> Layout:
    """The layout of rows whose prompt is the user's own, so that only the response is a role."""
    if unknown := [role for role in roles if role != "response"]:
        raise ValueError(f"data.columns: {listed(unknown)} has no place beside data.prompt, which names columns itself")
    if "response" in roles:
        response = roles["response"]
    else:
        response = _layout(_detected(columns, {}) if name == "auto" else name, columns, {}).columns.get("response", "")
        if not response:
            raise ValueError("data.prompt needs data.columns={response: COLUMN}, the column that is to be learned")
    ignored = tuple(column for column in columns if column not in (*template.columns, response))
    return Layout("completion", {"response": response}, template, (), ignored)


def _detected(columns: Sequence[str], roles: Mapping[str, str]) -> str:
    """The format that the roles make, or else the first known one whose columns are all there."""
    if {"prompt", "response"} <= roles.keys():
        return "alpaca"
    for name, needed in FORMATS.items():
        if roles and not roles.keys() <= _roles_of(name):
            continue
        if all(column in columns for column in {**needed, **roles}.values()):
            return name
    if ALSO_CHAT in columns and not roles:
        return "chat"
    known = "; ".join(f"{name}: {', '.join(needed.values())}" for name, needed in FORMATS.items())
    raise ValueError(
        f"data.format: the columns {listed(columns)} fit no known format ({known}); say which are which with "
        "data.columns={prompt: COLUMN, response: COLUMN}"
    )


def _roles_of(format_: str) -> set[str]:
    optional = OPTIONAL["alpaca"] if format_ in INSTRUCTIONS else OPTIONAL.get(format_, {})
    return {*FORMATS[format_], *optional}


def _layout(format_: str, columns: Sequence[str], roles: Mapping[str, str]) -> Layout:
    if unknown := [role for role in roles if role not in _roles_of(format_)]:
        raise ValueError(
            f"data.columns: data.format={format_} has no role {listed(unknown)}; it has "
            f"{', '.join(sorted(_roles_of(format_)))}"
        )
    needed = dict(FORMATS[format_])
    if format_ == "chat" and "messages" not in columns and ALSO_CHAT in columns:
        needed["messages"] = ALSO_CHAT
    optional = {role: column for role, column in OPTIONAL.get(format_, {}).items() if column in columns}
    used = {**needed, **optional, **roles}
    if missing := [column for column in used.values() if column not in columns]:
        raise ValueError(f"data.format: {format_} needs the column {listed(missing)}; there are {listed(columns)}")
    unread = [column for column in columns if column not in used.values()]
    if format_ == "chat":
        unread = [column for column in unread if column not in BESIDE]
        other = CONVERSATION if "messages" not in roles else ()  # who names the column to learn has chosen
        meaning = (*_CHANGES_MEANING, *other)
    else:
        meaning = MEDIA if format_ in ("text", "tokens") else _CHANGES_MEANING
    return Layout(
        format_,
        used,
        refused=tuple(column for column in unread if column in meaning),
        ignored=tuple(column for column in unread if column not in meaning),
    )


def listed(columns: Sequence[str]) -> str:
    """Names of columns, which come from a file: long ones are cut, and not more than 20 are told."""
    told = [repr(cut(column, 60)) for column in columns[:20]]
    return ", ".join([*told, f"and {len(columns) - 20} more"] if len(columns) > 20 else told)
