"""Whole numbers in English words."""

import re


def words_of(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


_UNITS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen"
)
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_VALUES = {word: value for value, word in enumerate(_UNITS.split("|"))} | {
    word: 10 * value for value, word in enumerate(_TENS.split("|"), start=2)
}
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

NUMBER_WORDS = f"{_UNITS}|{_TENS}"
"""The words of small numbers, as a regular expression."""


def in_words(text: str) -> tuple[int, list[str]] | None:
    """(the number with which a text begins, the words behind it) in lower case; None where it begins with none."""
    words = re.findall("[a-z]+", text.lower())
    total = part = used = 0
    for word in words:
        if word in _VALUES:
            part += _VALUES[word]
        elif used and word == "hundred":
            part *= 100
        elif used and word in _POWERS:
            total, part = total + part * _POWERS[word], 0
        elif not (used and word == "and"):
            break
        used += 1
    return (total + part, words[used:]) if used else None
