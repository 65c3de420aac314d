"""Numbers with words behind them: `3 thousand dollars`, `5\\text{ cm}^2`, `18 eggs`.

A word that counts (`thousand`) multiplies the number, units of measure are told apart, and any other word only names
what is counted.
"""

import re
from collections import Counter
from fractions import Fraction

from sympy.physics import units

from sorsa_ds.evaluate.grading.number_words import NUMBER_WORDS

Unit = dict[object, int]
"""A unit as its factors: quantity (sympy's, or a name) -> exponent; empty where no unit is named."""

_QUANTITY = re.compile(
    r"(?P<before>.*=)?\s*(?P<number>(?=[^=]*\d)(?:[^A-Za-z\\=]|\\[A-Za-z]+|\\[^A-Za-z])+?)"
    r"(?:\s*\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{(?P<text>[A-Za-z ./'’-]+)\}"
    r"|(?:(?<=\d)|\s+)(?P<words>[A-Za-z][A-Za-z ./'’-]*))"
    r"(?P<power>\s*\^\s*\{?\d\}?)?",
    re.DOTALL,
)
_READ_BY_MATH_VERIFY = re.compile(r"(?:pi|sqrt|inf|infinity|infty|sin|cos|tan|log|ln|exp|mod|base)\b|(?:percent|pct)$")
_CALCULATES = re.compile(
    r"^(?:squared|cubed|factorial|and|or|plus|minus)\b|\band (?:a|one) (?:half|third|quarter|fourth)\b"
    rf"|\b(?:hundred|thousand|million|billion|trillion) (?:and )?(?:{NUMBER_WORDS})\b"
    rf"|\b(?:and|or) (?:more|less|fewer|so|{NUMBER_WORDS})\b",
    re.IGNORECASE,
)
_COUNTS = {"dozen": "12", "hundred": "100", "thousand": "1000", "million": "10^6", "billion": "10^9",
           "trillion": "10^{12}", "lakh": "10^5", "crore": "10^7"}  # fmt: skip
MAGNITUDES = {"K": "thousand", "k": "thousand", "M": "million", "mn": "million", "mln": "million", "B": "billion",
              "bn": "billion"}  # fmt: skip
"""What letters behind a number multiply it by, as in `1.2M views`; alone they may be variables or units."""

_PARTS = {"half": 2, "halve": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
          "ninth": 9, "tenth": 10, "hundredth": 100, "thousandth": 1000, "millionth": 10**6}  # fmt: skip
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DECIMAL = re.compile(r"\d*\.\d+")
_PLAINER = [
    (re.compile(r"\b(?:square|sq)\b\.?\s*([A-Za-z]+)|([A-Za-z]+)\s+squared\b"), r"\1\2^2"),
    (re.compile(r"\b(?:cubic|cu)\b\.?\s*([A-Za-z]+)|([A-Za-z]+)\s+cubed\b"), r"\1\2^3"),
    (re.compile(r"\bin\b(?!\.?\s*[A-Za-z])"), "inch"),
    (re.compile(r"\b(?:mph|mi/hr?)\b"), "mile per hour"),
    (re.compile(r"\bdeg(?:ree)?s?\s+([CF])\b"), r"\1"),
    (re.compile(r"\b([ap])\.\s?m\b"), r"\1m"),
]
_UNIT = re.compile(r"(/|\bper\b)?\s*([A-Za-z]+)\.?\s*(?:\^\s*\{?(\d))?")
_SPELLED = {"hr": "hour", "min": "minute", "sec": "second", "lb": "pound", "oz": "ounce", "gal": "gallon",
            "centimetre": "centimeter", "metre": "meter", "kilometre": "kilometer", "litre": "liter"}  # fmt: skip
_UNKNOWN_TO_SYMPY = {"dollar", "cent", "euro", "week", "month", "ounce", "gallon", "am", "pm"}


def measured(text: str) -> tuple[str, Unit]:
    """(the expression without its words, the unit that they name); `3 thousand` becomes a product.

    Words that calculate in another way, as in `3 squared`, stay, so that the expression equals no number.
    """
    found = _QUANTITY.fullmatch(text)
    if not found or _READ_BY_MATH_VERIFY.match(found["words"] or ""):
        return text, {}
    before, number, words = found["before"] or "", found["number"].strip(), (found["text"] or found["words"]).strip()
    if _CALCULATES.search(words):
        return f"{before}{number} {words}", {}
    unit = _unit(words + (found["power"] or ""))
    if found["words"] and (len(words) == 1 or number + found["words"] in text):
        return text, unit  # may be variables: 5 m, 5xy
    if factors := _factors(words):
        exact = _DECIMAL.sub(_as_fraction, _THOUSANDS.sub("", number))
        number = r" \cdot ".join([f"({exact})", *factors])
    return before + number, unit


def _as_fraction(decimal: re.Match) -> str:
    """A decimal as a fraction, whose product with a power of ten is exact: 4.1 times a million is 4100000."""
    value = Fraction(decimal[0])
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def name_of(unit: Unit) -> str | None:
    """The name of a unit that is a single one, as hour is and miles per hour are not; None of others."""
    if len(unit) != 1 or set(unit.values()) != {1}:
        return None
    (quantity,) = unit
    return str(getattr(quantity, "name", quantity))


def _factors(words: str) -> list[str]:
    """The factors that the words stand for, up to the first word that is none; `5 fifth graders` is no fraction."""
    factors = []
    first, _, others = words.partition(" ")
    if (others or len(first) > 1) and first in MAGNITUDES:
        words = f"{MAGNITUDES[first]} {others}"
    for word in re.findall("[a-z]+", words.lower()):
        one = word.removesuffix("s")
        if one in _COUNTS:
            factors.append(_COUNTS[one])
        elif one in _PARTS and (one != word or word in ("half", words.lower())):
            factors.append(rf"\frac{{1}}{{{_PARTS[one]}}}")
        else:
            break
    return factors


def _unit(words: str) -> Unit:
    """The unit that words name: `square cm per hour` is {centimeter: 2, hour: -1}.

    It ends at the first word behind a unit that is no unit itself.
    """
    for written, plain in _PLAINER:
        words = written.sub(plain, words)
    unit: Counter[object] = Counter()
    for over, name, power in _UNIT.findall(words):
        quantity = _quantity(name)
        if quantity is not None:
            unit[quantity] += (-1 if over else 1) * int(power or 1)
        elif unit:
            break
    return unit


def _quantity(name: str) -> object | None:
    for spelled in (name, name.lower(), name.lower().removesuffix("s")):
        spelled = _SPELLED.get(spelled, spelled)
        if spelled in _UNKNOWN_TO_SYMPY:
            return spelled
        if isinstance(found := getattr(units, spelled, None), units.Quantity):
            return found
    return None
