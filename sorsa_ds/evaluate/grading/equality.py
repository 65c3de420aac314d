"""Whether two mathematical expressions mean the same: math-verify, with what it does not settle settled before.

Run as a program it is a grader's child process (`sorsa_ds.evaluate.grading.grader`): a line of JSON in, a line out.
"""

import json
import logging
import re
import resource
import sys
from typing import Literal

from math_verify import parse, verify
from sympy import Basic, Eq, FiniteSet, Float, Interval, Tuple

from sorsa_ds.evaluate.grading.quantities import measured

Verdict = Literal["right", "wrong", "unparsable"]

_SPACE_IN_NUMBER = re.compile(r"(?<=\d)(?:\\[,!: ]|\{,\})(?=\d{3})|(?<=\d)[  ](?=\d{3}(?!\d))")
_DRESS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?![a-z])")
_MIXED_NUMBER = re.compile(r"(?<![\d.^])(-?)(\d+)\s+(\d+)/(\d+)")
_LETTER = re.compile(r"(\(?)([A-Za-z])\)?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_BASE = re.compile(r"(?<![\^\\\w])[\dA-F]*\d[\dA-F]*_")


def compare(reference: str, answer: str) -> Verdict:
    """Grade an answer against a reference; both LaTeX or plain text, with or without dollar signs.

    Equal are, beside what math-verify calls so (1,000 and 1000; 0.5 and \\frac12; 50\\% and 50; 10\\text{ cm} and 10;
    an equation and its right side): what reads the same, `18 dollars` and 18, `3 thousand` and 3000, `2 1/2` and 2.5,
    and a choice in any dress, \\text{(A)} and a. Different are, though not for math-verify, `5 cm` and `5 m`, x and X,
    10_2 and 10, `6 = 5` and 5, the point (1,3) and the numbers 3, 1 or the set \\{1, 3\\}. An exclamation mark that
    stands apart, `5 !`, ends a sentence or means the factorial, whichever is right.
    """
    if answer.endswith(" !"):
        verdict = compare(reference, answer.removesuffix(" !"))
        return verdict if verdict == "right" else compare(reference, answer.replace(" !", "!"))
    wanted, given = clean(reference), clean(answer)
    if not given:
        return "unparsable"
    if wanted == given:
        return "right"
    letters = [_LETTER.fullmatch(_TEXT.sub(r"\1", text).strip()) for text in (wanted, given)]
    if all(letters):
        return "right" if _same_letter(*letters) else "wrong"
    if _BASE.search(wanted) or _BASE.search(given):
        return "right" if re.sub(r"[{}\s]", "", wanted) == re.sub(r"[{}\s]", "", given) else "wrong"
    (wanted, wanted_unit), (given, given_unit) = measured(wanted), measured(given)
    if wanted_unit and given_unit and wanted_unit != given_unit:
        return "wrong"
    return _verified(_improper(wanted), _improper(given))


def clean(text: str) -> str:
    """An expression without what only dresses it: dollar signs, LaTeX's brackets, a full stop, spaces in numbers."""
    return _SPACE_IN_NUMBER.sub("", _DRESS.sub("", text.strip()).strip().rstrip(".").strip())


def _same_letter(wanted: re.Match, given: re.Match) -> bool:
    """Case matters between variables, not between choices: in brackets, or from A to E."""
    first, second = wanted[2], given[2]
    choices = wanted[1] or given[1] or first in "ABCDEabcde"
    return first == second or bool(choices and first.lower() == second.lower())


def _improper(text: str) -> str:
    """`2 1/2` as a fraction; math-verify reads a product."""
    return _MIXED_NUMBER.sub(lambda m: rf"{m[1]}\frac{{{int(m[2]) * int(m[4]) + int(m[3])}}}{{{m[4]}}}", text)


def _verified(wanted: str, given: str) -> Verdict:
    # Time is kept by the parent, who can end a computation that no signal interrupts.
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
    """A set, or numbers with commas between them; `x = 1, y = 2` has the order of its names."""
    return isinstance(expression, FiniteSet) and not expression.atoms(Eq)


def _holds(equation: Eq) -> bool:
    """False where both sides are numbers that differ by more than rounding, as in 6 = 5."""
    left, right = equation.args
    if equation.free_symbols or verify(left, right, timeout_seconds=None):
        return True
    return equation.has(Float) and abs(float(left.doit()) - float(right.doit())) <= 0.02 * abs(float(right.doit()))


def main() -> None:
    """Answer requests until the input ends; the argument is the memory that this process may take, in bytes."""
    logging.disable(logging.WARNING)  # of time limits that are switched off
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            verdict = compare(*json.loads(line))
        except Exception:  # sympy raises anything, MemoryError and RecursionError too
            verdict = "unparsable"
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
