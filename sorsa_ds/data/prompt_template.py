"""A user's own prompt, `data.prompt`: a Jinja text with the columns of a row."""

from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sorsa_ds.runtime.words import cut


class NullColumnError(Exception):
    """A column that a prompt writes down is missing in a row."""


class PromptTemplate:
    """A prompt that is made of a row's columns.

    Attributes: `columns`, the names of the columns that it uses.

    Raises:
        ValueError: the text is no template.
    """

    def __init__(self, text: str):
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=_written, keep_trailing_newline=True
        )
        try:
            self.columns = sorted(meta.find_undeclared_variables(environment.parse(text)))
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ValueError(f"data.prompt: {error}, in its line {getattr(error, 'lineno', 1)}") from error

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            NullColumnError: it writes a column that is missing in the row.
            ValueError: it writes a value that is no text, or fails with this row.
        """
        try:
            return self._template.render({column: row[column] for column in self.columns})
        except NullColumnError:
            raise
        except Exception as error:  # an expression of a template can raise anything
            raise ValueError(f"data.prompt: {error}") from error


def _written(value: Any) -> Any:
    """What is written for the value of an expression."""
    if value is None:
        raise NullColumnError
    if isinstance(value, bool) or not isinstance(value, str | int | StrictUndefined):
        raise ValueError(f"it writes {cut(repr(value))} where text is needed")
    return value
