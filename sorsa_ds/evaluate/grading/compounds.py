"""Quantities of several units: `8 hours and 30 minutes`, `5 ft 6 in`, `3 dollars and 50 cents`."""

import re
from fractions import Fraction
from typing import NamedTuple

_SCALES = [
    {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800},
    {"month": 1, "year": 12, "decade": 120},
    {"inch": 1, "foot": 12, "yard": 36, "mile": 63360},
    {"ounce": 1, "pound": 16, "ton": 32000},
    {"cent": 1, "dollar": 100},
    {"cup": 1, "pint": 2, "quart": 4, "gallon": 16},
    {"millimeter": 1, "centimeter": 10, "meter": 1000, "kilometer": 10**6},
    {"milligram": 1, "gram": 1000, "kilogram": 10**6},
    {"milliliter": 1, "liter": 1000},
]
"""Units that are parts of one another, and how many of the smallest each is."""

_SHORT = {"s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "d": "day",
          "wk": "week", "mo": "month", "yr": "year", "inche": "inch", "in": "inch", '"': "inch", "ft": "foot",
          "feet": "foot", "'": "foot", "yd": "yard", "mi": "mile", "oz": "ounce", "lb": "pound", "pt": "pint",
          "qt": "quart", "gal": "gallon", "mm": "millimeter", "cm": "centimeter", "km": "kilometer", "mg": "milligram",
          "g": "gram", "kg": "kilogram", "ml": "milliliter", "l": "liter"}  # fmt: skip
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
"""A number that is written in digits, as a regular expression."""

_PART = re.compile(rf"({NUMBER}(?:\s+\d+/\d+)?|\d+/\d+)\s*-?\s*([A-Z]?[a-z]+(?![A-Za-z])\.?|L\b|['\"])")
_JOINED = re.compile(r"\s*(?:,\s*and\b|,|&|\band\b)?\s*", re.IGNORECASE)


class Compound(NamedTuple):
    """A quantity in the units of one scale."""

    first: str
    """The number of the first unit, as it is written."""
    total: Fraction
    """The whole quantity, in the scale's smallest unit."""
    units: list[str]
    """The units that it names, the largest first."""
    scale: dict[str, int]
    end: int
    """Where in the text it ends."""

    def within(self, unit: str) -> str:
        """The whole quantity in one unit of its scale, as an expression with the unit's name."""
        amount = self.total / self.scale[unit]
        return rf"\frac{{{amount.numerator}}}{{{amount.denominator}}} {unit}"


def compound(text: str) -> Compound | None:
    """The quantity with which a text begins, in one unit or in several from the largest to the smallest, else None."""
    first, total, end, position = "", Fraction(0), 0, 0
    units: list[str] = []
    scale: dict[str, int] = {}
    while part := _PART.match(text, position):
        unit = _unit(part[2], within_hours="hour" in units)
        if not units:
            first, scale = part[1], next((each for each in _SCALES if unit in each), {})
        if unit not in scale or (units and scale[unit] >= scale[units[-1]]):
            break
        total += sum(map(Fraction, part[1].replace(",", "").split())) * scale[unit]
        units.append(unit)
        end = part.end()
        position = joined.end() if (joined := _JOINED.match(text, end)) else end
    return Compound(first, total, units, scale, end) if units else None


def _unit(word: str, within_hours: bool) -> str:
    """The unit's name in the scales; m is a minute behind hours, else a meter."""
    word = word.lower().rstrip(".")
    if word == "m":
        return "minute" if within_hours else "meter"
    one = word.removesuffix("s") or word
    return _SHORT.get(word) or _SHORT.get(one) or one
