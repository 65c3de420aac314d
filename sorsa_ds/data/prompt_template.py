"""A user's own prompt, `data.prompt`: a Jinja text with the columns of a row."""

from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta, nodes
from jinja2.filters import do_join, pass_eval_context
from jinja2.nodes import EvalContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sorsa_ds.data.written_number import WrittenNumber, is_printed
from sorsa_ds.runtime.words import cut

_OF_TEXT = (
    "capitalize", "center", "e", "escape", "indent", "lower", "replace", "string", "title", "trim", "truncate", "upper",
    "urlencode", "wordcount", "wordwrap",
)  # fmt: skip
"""Filters of Jinja that take any value for text, so that null would become `None`."""


class NullColumnError(Exception):
    """A column that a prompt uses is missing in a row."""


class _Null:
    """Null in a row. Tests find it equal to `none`, and false; any other use stops the row."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # by which programs ask what a value is, rather than use it
        raise NullColumnError

    def _used(self, *args: object) -> Any:
        raise NullColumnError

    __str__ = __repr__ = __format__ = __iter__ = __len__ = __getitem__ = __contains__ = __call__ = _used
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __index__ = _used
    __neg__ = __pos__ = __abs__ = __round__ = _used
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _used
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _used


_NULL = _Null()


class PromptTemplate:
    """A prompt that is made of a row's columns.

    Numbers of JSON are written as they stand in the file, and are numbers in comparisons and sums. Whatever has no one
    way of being written (null, true and false, fractions that were computed, lists) is never turned into text, be it by
    an expression, by `~` or by a filter. Null can be tested, and written by `tojson`; nothing else can be done with it.

    Attributes: `columns`, the names of the columns that it uses.

    Raises:
        ValueError: the text is no template.
    """

    def __init__(self, text: str):
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=_written, keep_trailing_newline=True
        )
        environment.filters |= {"join": _joined, "written": _written}
        environment.tests["none"] = lambda value: value is None or isinstance(value, _Null)
        environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _for_json}
        try:
            tree = environment.parse(text)
            _guard(tree)
            self.columns = sorted(meta.find_undeclared_variables(tree))
            self._template = environment.from_string(tree)
        except TemplateError as error:
            raise ValueError(f"data.prompt: {error}, in its line {getattr(error, 'lineno', 1)}") from error

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            NullColumnError: the template uses a column that is missing in the row other than in a test.
            ValueError: the template writes a value that is no text, compares a number with text, or fails at this row.
        """
        try:
            return self._template.render({column: _value(row[column]) for column in self.columns})
        except NullColumnError:
            raise
        except Exception as error:  # an expression of a template can raise anything
            raise ValueError(f"data.prompt: {error}") from error


def _guard(tree: nodes.Template) -> None:
    """Let no part of a template turn into text what cannot be written."""
    for joined in tree.find_all(nodes.Concat):
        joined.nodes = [_as_written(part) for part in joined.nodes]
    for used in list(tree.find_all(nodes.Filter)):
        if used.name in _OF_TEXT and used.node is not None:
            used.node = _as_written(used.node)
        elif used.name == "format":
            used.args = [_as_written(part) for part in used.args]


def _as_written(part: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(part, "written", [], [], None, None, lineno=part.lineno)


def _value(cell: Any) -> Any:
    if isinstance(cell, dict):
        return {name: _value(inner) for name, inner in cell.items()}
    if isinstance(cell, list):
        return [_value(inner) for inner in cell]
    return cell.value() if isinstance(cell, WrittenNumber) else _NULL if cell is None else cell


def _for_json(value: Any) -> None:
    """What `tojson` writes for a value that JSON does not know."""
    if not isinstance(value, _Null):
        raise ValueError(f"it writes {cut(repr(value))} as JSON, which cannot hold it")


def _written(value: Any) -> Any:
    """What is written for the value of an expression."""
    if value is None or isinstance(value, _Null):
        raise NullColumnError
    if isinstance(value, bool) or not (isinstance(value, str | int | StrictUndefined) or is_printed(value)):
        raise ValueError(f"it writes {cut(repr(value))} where text is needed")
    return value


@pass_eval_context
def _joined(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's own filter, for values that can be written."""
    found = list(value)
    if attribute is None:
        found = [_written(one) for one in found]
    return do_join(context, found, d, attribute)
