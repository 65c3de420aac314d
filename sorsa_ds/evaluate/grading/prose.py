"""What an answer in words says: `She has about 14 eggs (9 + 5), altogether.` says 14 eggs.

A number counts where the words before it lead to it and what is behind its unit is a remark. Words that calculate
(`half of 14`), bound (`more than 14`), deny (`not 14`) or leave a choice (`14 or 15`, `14 eggs and 3 hens`) say no
number, and then nothing is read.
"""

import re
from fractions import Fraction

from sympy import sympify

from sorsa_ds.evaluate.grading.compounds import NUMBER, Compound, compound
from sorsa_ds.evaluate.grading.money import currencies
from sorsa_ds.evaluate.grading.number_words import NUMBER_WORDS, in_words, words_of
from sorsa_ds.evaluate.grading.quantities import MAGNITUDES

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|underline)\s*\{([^{}]*)\}")
_QUOTED = re.compile(r'^"([^"]*)"$')
_INTRODUCTION = re.compile(rf"(?i:in|after|for|within|during|at|by|with)\s+(?:the\s+)?{NUMBER}(?:\s+[A-Za-z]+)+,\s+")
_BEFORE = re.compile(r"(?P<words>(?:[A-Za-z][A-Za-z'.-]*(?=[\s,:=])|[\s,])*)(?P<joint>[:=]?)\s*")
_ABOUT = re.compile(r"(?:~|\\approx\b|\\sim\b)\s*")
_VERBS = words_of(
    "is are was were be equals equal has have had makes make made gets get got costs cost takes take took needs need "
    "earns earn earned sells sell sold spends spend spent leaves leave left pays pay paid saves save saved buys buy "
    "bought becomes become remain remains remained gives give gave receives receive received eats eat ate reads read "
    "travels weighs totals owes collects collected uses used can will must would could should did"
)
_DENIES = words_of("not no never none neither nor either or if unless except without wrong incorrect false")
_BOUNDS = words_of(
    "more less fewer greater larger smaller higher lower over under above below beyond exceed exceeds exceeding least "
    "most until till up between from nearly almost maximum minimum max min"
)
_CALCULATES = words_of(
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth eighth tenth tenths twice thrice "
    "double triple quadruple times root square squared cube cubed sum difference product quotient ratio remainder "
    "percent log ln sin cos tan sqrt mod modulo base power factor factorial multiple plus divided multiplied every "
    "reciprocal inverse pi hundred thousand million billion dozen"
)
_SIGNS = frozenset({"minus", "negative"})

_AMOUNT = (
    rf"[-+]?\s*(?:{NUMBER}(?:\s+\d+/\d+|/\d+)?|\.\d+|\d*\\[dt]?frac\{{\d+\}}\{{\d+\}}|\d*\\sqrt\{{\d+\}})"
    r"(?:\s*(?:\\?%|\^\s*\{?\\circ\}?))?"
)
_OF_MONEY = {"m": "million", "b": "billion", "T": "trillion", "t": "trillion"}
_STEM = re.compile(
    rf"(?P<sum>[^A-Za-z]*=\s*)?(?P<amount>{_AMOUNT})(?P<big>\s?(?:K|k|M|m|mn|mln|B|b|bn|T|t)(?![A-Za-z^/.]))?"
    r"(?P<unit>(?:(?:\s*|-)[A-Za-z][A-Za-z'./-]*(?:\^\{?\d\}?)?(?:\s+[A-Za-z][A-Za-z'./-]*(?:\^\{?\d\}?)?)*?)?)"
    r"(?P<remark>|\s*[,;(\[=].*|\s*:\s.*|\s+-\s.*|\s+(?:for|after|during|within|at|when|from)\s(?=.*\d).*"
    rf"|\s+in\s+{NUMBER}\s+(?:second|minute|hour|day|week|month|year)s?\b.*)",
    re.DOTALL,
)
_CHOICE = re.compile(rf"\b(?:or|and)\s+(?:more|less|fewer|so|above|below|over|under|{NUMBER_WORDS})\b", re.IGNORECASE)
_BRACKET = re.compile(r"[(\[]((?:[^()\[\]]|\([^()]*\))*)[)\]](.*)", re.DOTALL)
_THAT_IS = re.compile(r"(?:i\.e\.|that is|=)[\s,:]*", re.IGNORECASE)
_VAGUE = re.compile(r"(?:give or take|more or less|or so)\b", re.IGNORECASE)
_EXPLAINS = re.compile(
    r"(?:i\.e|that is|that's|not|of which|including|with|as|given|rather|compared|assuming|leaving|making|meaning"
    r"|calculated|rounded|based|when|after|during|within|where|for|from|at|in|per|each)\b",
    re.IGNORECASE,
)
_RETRACTS = re.compile(
    rf"^no\b|\b(?:wrong|incorrect|false|mistaken)\b|\brounded\s+(?:(?:up|down|off)\s+)?to\s+(?:about\s+)?[^\w\s]*{NUMBER}"
    rf"(?!\s+(?:decimal|significant|place|digit))|^from\s+[^\w\s]*{NUMBER}\s*$",
    re.IGNORECASE,
)
"""A remark that takes the number back, or goes on to another one: `100, rounded to 120`."""
_CONCLUDES = re.compile(
    rf"(?<=.)\b(?:it|that|this|which|total|result|answer|sum)\s+(?:is|are|was|becomes|gives|makes|equals|gets)\s+"
    rf"[^\w\s]*({NUMBER})|\b({NUMBER})\s+(?:in total|altogether|in all)\b",
    re.IGNORECASE,
)
_LATER = re.compile(r"(?:after|during|within|when)\b", re.IGNORECASE)
_ADDS = re.compile(
    rf"\d|\b(?:or|and|but|plus|minus|to|squared|cubed|doubled|tripled|halved|factorial|times|dozen|hundred|thousand"
    rf"|million|billion|negative|half|{NUMBER_WORDS})\b",
    re.IGNORECASE,
)
_CHOOSES = re.compile(r"\s*(?:or|and|to|but|plus|minus|more|less|up)\b", re.IGNORECASE)
_RATE = re.compile(r"\b(?:every|each|per)\s+\d")
_A_WORD = re.compile(r"[A-Za-z]{3,}")
_SUM = re.compile(r"[\d\s+*/().-]+")


def readings(text: str, money: bool, unit: str | None) -> list[str]:
    """Plainer expressions of which each is what the answer says, none where it says no single quantity.

    Args:
        text: an answer in plain characters, without signs of currencies.
        money: whether it had one.
        unit: the name of the one unit that the reference names; None where it names none.
    """
    unwrapped = _QUOTED.sub(r"\1", _TEXT.sub(r"\1", text).strip())
    said = _after_the_words(_INTRODUCTION.sub("", unwrapped, count=1))
    if said is None:
        return []
    plainer = [] if said == text else [said]
    if stem := _STEM.fullmatch(_times(said)):
        plainer += _of_stem(stem, money)
    return plainer + _of_units(said, unit)


def _after_the_words(text: str) -> str | None:
    """The text behind the words that lead to a quantity; None where they do not, or where no quantity follows."""
    before = _BEFORE.match(text)
    assert before is not None  # it matches nothing, too
    words = [word.strip(".-").lower() for word in re.findall(r"[A-Za-z'.-]+", before["words"])]
    said = _ABOUT.sub("", text[before.end() :], count=1)
    if not said or said[0].isalpha() or not _lead(words, before["joint"]):
        return None
    return f"-{said}" if words and words[-1] in _SIGNS else said


def _lead(words: list[str], joint: str) -> bool:
    """Whether words before a number only say what it is. Those up to the last verb are about something else."""
    if any(word in _DENIES or word.endswith("n't") or (len(word) == 1 and word not in "ai") for word in words):
        return False
    last = max((place for place, word in enumerate(words) if word in _VERBS), default=-1)
    tail = [] if joint else words[last + 1 :]
    return not any(word in _BOUNDS or word in _CALCULATES or in_words(word) is not None for word in tail)


def _of_stem(stem: re.Match, money: bool) -> list[str]:
    unit, amount, big = stem["unit"], stem["amount"], (stem["big"] or "").strip()
    if _CHOICE.search(unit) or not _is_remark(
        stem["remark"], amount, bool(unit or big or money or "%" in amount), unit
    ):
        return []
    magnitude = MAGNITUDES.get(big) or (_OF_MONEY.get(big) if money else None)
    counted = f" {magnitude}" if magnitude else stem["big"] or ""
    return [f"{stem['sum'] or ''}{amount}{counted}{unit}"]


def _is_remark(text: str, amount: str, named: bool, unit: str) -> bool:
    """Whether what is behind an amount leaves it as it is. `named`: what is counted was named before."""
    text = text.strip()
    if not text:
        return True
    if text[0] == "=":
        return _equals(text, amount)
    if bracket := _BRACKET.fullmatch(text):
        inner, rest = _THAT_IS.sub("", bracket[1].strip()), bracket[2]
        words = bool(_A_WORD.search(inner))
        fits = (named or words or _equals(inner, amount)) and not _CHOOSES.match(inner)
        fits = fits and not _contradicts(inner, amount, unit) and not _takes_back(inner, amount)
        return fits and _is_remark(rest, amount, True, unit)
    mark, text = (text[0], text[1:].strip()) if text[0] in ",;:-" else ("", text)
    text = _VAGUE.sub("", text, count=1).strip()
    if _CHOOSES.match(text) or _takes_back(text, amount):
        return False
    explained = (mark == ":" and named) or bool(_EXPLAINS.match(text))
    return (
        explained and (named or bool(mark) or bool(_LATER.match(text))) and not _RATE.search(text)
    ) or not _ADDS.search(text)


def _takes_back(remark: str, amount: str) -> bool:
    """Whether a remark denies the amount, or ends with another one, as in `5 when 3 are added it is 8`."""
    concluded = [found[1] or found[2] for found in _CONCLUDES.finditer(remark)]
    return bool(_RETRACTS.search(remark)) or any(_value(number) != _value(amount) for number in concluded)


def _contradicts(inner: str, amount: str, unit: str) -> bool:
    """Whether a remark has another number of the same in words, as in `5 (six)`."""
    said = in_words(inner)
    if said is None:
        return False
    value, rest = said
    same = not rest or rest[0] in unit.lower().split() or bool(currencies(rest[0]))
    plain = amount.replace(",", "").strip()
    return same and plain.isdigit() and value != int(plain)


def _equals(calculation: str, amount: str) -> bool:
    """Whether every side of a calculation, `48 + 24 = 72`, has the amount's value."""
    wanted = _value(amount)
    sides = [side for side in calculation.split("=") if side.strip()]
    return wanted is not None and bool(sides) and all(_value(side) == wanted for side in sides)


def _value(text: str) -> Fraction | None:
    """The value of a calculation with numbers, + - * / and brackets; None where it is none."""
    text = re.sub(r"\\times|\\cdot", "*", re.sub(r"\\?%", "/100", text.replace(",", "")))
    if not _SUM.fullmatch(text) or "**" in text or "//" in text or len(text) > 200:
        return None
    try:
        return Fraction(str(sympify(text, rational=True)))
    except Exception:  # sympify raises whatever it met: it is no calculation
        return None


def _times(text: str) -> str:
    """The text with each x between numbers as the times sign that it is."""
    return re.sub(r"(?<=\d)\s*[xX]\s*(?=\d)", " * ", text)


def _of_units(said: str, wanted: str | None) -> list[str]:
    """The quantity in the units in which it may have been asked for, where it has several or is said in several."""
    quantities = _restated(said)
    if not quantities:
        return []
    if wanted is not None:
        return [quantities[0].within(wanted)] if wanted in quantities[0].scale else []
    if len(quantities) == len(quantities[0].units) == 1:
        return []
    amounts = [quantity.within(unit) for quantity in quantities for unit in quantity.units]
    mixed = len(quantities[0].units) > 1 and "dollar" not in quantities[0].units
    bare = [amount.rpartition(" ")[0] for amount in amounts]
    return [*bare, quantities[0].first] if mixed else bare


def _restated(said: str) -> list[Compound]:
    """A quantity of units, and the same once more in brackets or behind `or` or `=`; none where they differ."""
    first = compound(said)
    if first is None:
        return []
    rest = said[first.end :].strip()
    again = re.fullmatch(r"\(\s*(?:or|=)?\s*(.+?)\s*\)|(?:,?\s*or|=)\s+(.+)", rest)
    second = compound(again[1] or again[2]) if again else None
    if second and (second.scale, second.total) == (first.scale, first.total):
        return [first, second]
    words = rest.split(" ")[0]
    return [first] if _is_remark(re.sub(r"^[A-Za-z][A-Za-z' ]*", "", rest), "", True, words) else []
