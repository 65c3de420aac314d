"""Whole numbers in English words."""

import re

_SMALL = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)}  # fmt: skip
_TENS = {word: 10 * value for value, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
)}  # fmt: skip
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

NUMBER_WORDS = "|".join([*_SMALL, *_TENS])
"""The words of small numbers, as a regular expression."""


def in_words(text: str) -> tuple[int, list[str]] | None:
    """(the number with which a text begins, the words behind it) in lower case; None where it begins with none."""
    words = re.findall("[a-z]+", text.lower())
    total = part = used = 0
    for word in words:
        if word in _SMALL or word in _TENS:
            part += _SMALL.get(word, 0) + _TENS.get(word, 0)
        elif used and word == "hundred":
            part *= 100
        elif used and word in _POWERS:
            total, part = total + part * _POWERS[word], 0
        elif not (used and word == "and"):
            break
        used += 1
    return (total + part, words[used:]) if used else None
