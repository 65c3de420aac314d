"""Numbers of JSON that stay as they are written: text wherever text is needed, and numbers for `data.prompt`."""

from typing import Any


class WrittenNumber(str):
    """The text of a number in a column of JSON, such as `1.50` or `1e5`. All but `data.prompt` take it as text."""

    __slots__ = ()

    def value(self) -> "_Whole | _Fraction":
        """The number, which prints as it is written."""
        return _Whole(self) if self.removeprefix("-").isdigit() else _Fraction(self)


class _Printed:
    """What whole numbers and fractions have in common: they print as they are written, and are no text."""

    _text: str

    def __new__(cls, text: str) -> Any:
        number = super().__new__(cls, text)  # type: ignore[call-arg]
        number._text = str(text)
        return number

    def __repr__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            raise ValueError(f"the number {self} is compared with the text {other!r}; write it without quotes")
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return super().__hash__()


class _Whole(_Printed, int):
    """A whole number."""


class _Fraction(_Printed, float):
    """A number with a point or an exponent."""


def is_printed(value: object) -> bool:
    """Whether a number prints as a file has it, which a fraction that was computed does not."""
    return isinstance(value, _Printed)
