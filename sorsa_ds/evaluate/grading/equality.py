"""Whether two mathematical expressions mean the same: math-verify decides, after the cases that it decides otherwise.

Run as a program this is the grader's child process (`sorsa_ds.evaluate.grading.grader`), which answers each line of
JSON with another. It must start without torch.
"""

import logging
import re
from typing import Literal

from math_verify import parse, verify
from sympy import Basic, Eq, FiniteSet, Float, Interval, Tuple

from sorsa_ds.evaluate.grading.characters import plain_characters
from sorsa_ds.evaluate.grading.compounds import NUMBER
from sorsa_ds.evaluate.grading.money import currencies, without_currency
from sorsa_ds.evaluate.grading.prose import readings
from sorsa_ds.evaluate.grading.quantities import measured, name_of
from sorsa_ds.runtime.line_process import serve

Verdict = Literal["right", "wrong", "unparsable"]

_INSIDE_NUMBER = re.compile(r"(?<=\d)(?:\\[,!: ]|\{,\})(?=\d{3})|(?<=\d)[ ~'](?=\d{3}(?!\d))")
_POINTS_FOR_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,])")
_SILENT_ZEROS = re.compile(r"(?<![\d:])(\d+)(?:\.0+(?=\s*\\?%)|:00(?=\s*[ap]\.?m\b))")
_RANGE = re.compile(rf"({NUMBER})(?:[-~]| to )({NUMBER})(?: [A-Za-z]{{2,}}.*)?")
_DRESS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?![a-z])")
_MIXED_NUMBER = re.compile(r"(?<![\d.^])(-?)(\d+)\s+(\d+)/(\d+)")
_LETTER = re.compile(r"(\(?)([A-Za-z])\)?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]?[a-z]{3,}|\b(?:i\.e|e\.g)|[(\[]\s*=|[^\x00-\x7f\w]")
_NAMED_IN_LATEX = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}")
_MATHEMATICAL = re.compile(
    r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|exp|sqrt|mod|gcd|lcm|[Ii]nf(?:ty|inity)?|min|max|lim"
    r"|cis|det|percent|pct|base|frac|union|theta|alpha|beta|gamma|lambda"
)
_BASE = re.compile(r"(?<![\^\\\w])[\dA-F]*\d[\dA-F]*_")


def grade_answer(reference: str, answer: str) -> Verdict:
    """Grade an answer against a reference; both are LaTeX or plain text, with or without dollar signs.

    math-verify takes as equal 1,000 and 1000; 0.5 and \\frac12; 50\\% and 50; 10\\text{ cm} and 10; an equation and its
    right side. Here are equal as well: texts that read the same, `18 dollars` and 18, `3 thousand` and 3000, `2 1/2`
    and 2.5, and a choice however it is written, \\text{(A)} and a. Here are different, though equal to math-verify:
    `5 cm` and `5 m`, x and X, 10_2 and 10, `6 = 5` and 5, the point (1,3) and the numbers 3, 1 or the set \\{1, 3\\}.
    An exclamation mark that stands apart, `5 !`, is read as the end of a sentence and as the factorial; it is enough
    that one of these is right. An answer in words is right where what it says is, by the rules of `prose`.
    """
    if answer.endswith(" !"):
        verdict = grade_answer(reference, answer.removesuffix(" !"))
        return verdict if verdict == "right" else grade_answer(reference, answer.replace(" !", "!"))
    wanted, given = clean_expression(reference), clean_expression(answer)
    money, named = currencies(answer), currencies(reference)
    if money and named and not money & named:
        return "wrong"
    verdict = _compared(wanted, given)
    for said in readings(given, bool(money), name_of(measured(wanted)[1])) if verdict != "right" else ():
        verdict = _compared(wanted, said)
        if verdict == "right":
            break
    return verdict


def _compared(wanted: str, given: str) -> Verdict:
    """Grade one expression against another; both are clean."""
    if not given:
        return "unparsable"
    if wanted == given:
        return "right"
    if _is_range(wanted) or _is_range(given) or (_is_bound(wanted) != _is_bound(given)):
        return "right" if _even(wanted) == _even(given) else "wrong"
    first, second = (_LETTER.fullmatch(_TEXT.sub(r"\1", text).strip()) for text in (wanted, given))
    if first and second:
        return "right" if _same_letter(first, second) else "wrong"
    if _BASE.search(wanted) or _BASE.search(given):
        return "right" if re.sub(r"[{}\s]", "", wanted) == re.sub(r"[{}\s]", "", given) else "wrong"
    (wanted, wanted_unit), (given, given_unit) = measured(wanted), measured(given)
    if wanted_unit and given_unit and wanted_unit != given_unit:
        return "wrong"
    if _has_prose(given) and not _has_prose(_TEXT.sub(r"\1", wanted)):
        return "unparsable"
    return _verified(_improper(wanted), _improper(given))


def clean_expression(text: str) -> str:
    """The expression in plain characters, without currencies, LaTeX's brackets, a final full stop, marks in numbers."""
    text = _DRESS.sub("", without_currency(plain_characters(text))).strip().rstrip(".?").strip()
    text = _POINTS_FOR_THOUSANDS.sub(lambda found: f"{found[1].replace('.', '')}.{found[2]}", text)
    return _SILENT_ZEROS.sub(r"\1", _INSIDE_NUMBER.sub("", text))


def _has_prose(text: str) -> bool:
    """Whether this has words, of which math-verify would read each letter as a factor and `and` as a list's comma."""
    return not all(_MATHEMATICAL.fullmatch(word) for word in _WORD.findall(_NAMED_IN_LATEX.sub("", text)))


def _is_range(text: str) -> bool:
    """Whether this is all from one number up to a larger: `3-5`, which math-verify would read as -2, `3 to 5`."""
    found = _RANGE.fullmatch(text)
    return found is not None and float(found[1].replace(",", "")) < float(found[2].replace(",", ""))


def _is_bound(text: str) -> bool:
    """Whether this says that something unnamed is larger or smaller than what follows, which is no number."""
    return bool(re.match(r"[<>]|\\(?:geq?|leq?|gt|lt)(?:slant)?(?![a-z])", text))


def _even(text: str) -> str:
    return re.sub(r"\s", "", text.replace(" to ", "-").replace("~", "-"))


def _same_letter(wanted: re.Match, given: re.Match) -> bool:
    """Whether two letters mean the same. Case matters, except in choices: letters in brackets, or from A to E."""
    first, second = wanted[2], given[2]
    choices = wanted[1] or given[1] or first in "ABCDEabcde"
    return first == second or bool(choices and first.lower() == second.lower())


def _improper(text: str) -> str:
    """The text with each mixed number, `2 1/2`, as a fraction; math-verify would read it as a product."""
    return _MIXED_NUMBER.sub(lambda m: rf"{m[1]}\frac{{{int(m[2]) * int(m[4]) + int(m[3])}}}{{{m[4]}}}", text)


def _verified(wanted: str, given: str) -> Verdict:
    # The parent process keeps the time, since it can end a computation that no signal interrupts.
    parsed = [parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None) for text in (wanted, given)]
    if not all(parsed):
        return "unparsable" if not parsed[1] else "wrong"
    (first,), (second,) = parsed
    if (_ordered(first) and _unordered(second)) or (_unordered(first) and _ordered(second)):
        return "wrong"
    if not all(_holds(equation) for equation in second.atoms(Eq)):
        return "wrong"
    return "right" if verify(first, second, timeout_seconds=None) else "wrong"


def _ordered(expression: Basic) -> bool:
    return isinstance(getattr(expression, "rhs", expression), (Tuple, Interval))


def _unordered(expression: Basic) -> bool:
    """Whether this is a set, or numbers with commas between them; `x = 1, y = 2` is ordered by its names."""
    return isinstance(expression, FiniteSet) and not expression.atoms(Eq)


def _holds(equation: Eq) -> bool:
    """Whether an equation may hold: False where its sides are numbers that differ beyond rounding, as in 6 = 5."""
    left, right = equation.args
    if equation.free_symbols or verify(left, right, timeout_seconds=None):
        return True
    return equation.has(Float) and abs(float(left.doit()) - float(right.doit())) <= 0.02 * abs(float(right.doit()))


def main() -> None:
    """Answer the grader's questions."""
    logging.disable(logging.WARNING)  # math-verify warns that its time limits are switched off
    serve(_answer)


def _answer(question: list[str]) -> Verdict:
    reference, answer = question
    try:
        return grade_answer(reference, answer)
    except Exception:  # sympy may raise anything, also MemoryError and RecursionError
        return "unparsable"


if __name__ == "__main__":
    main()
