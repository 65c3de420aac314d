"""Whether two mathematical expressions mean the same: math-verify, with what it does not settle settled before.

Run as a program it is a grader's child process (`sorsa_ds.evaluate.grading`): a line of JSON in, a line out.
"""

import json
import re
import resource
import sys
from typing import Literal

Verdict = Literal["right", "wrong", "unparsable"]

_SPACE_IN_NUMBER = re.compile(r"(?<=\d)(?:\\[,!: ]|\{,\})(?=\d{3})|(?<=\d)[  ](?=\d{3}(?!\d))")
_NUMBER_WITH_WORDS = re.compile(r"([^A-Za-z\\]*\d[^A-Za-z\\]*?)\s+(?!pi\b|sqrt|inf)[A-Za-z]{2}[A-Za-z ./-]*")
_MIXED_NUMBER = re.compile(r"(-?)(\d+)\s+(\d+)/(\d+)")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_TUPLE = re.compile(r"[(\[].*,.*[)\]]", re.DOTALL)
_LIST = re.compile(r"[^()\[\]{}=<>\\]*,[^()\[\]{}=<>\\]*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def compare(reference: str, answer: str) -> Verdict:
    """Grade an answer against a reference; both LaTeX or plain text, with or without dollar signs.

    Equal are, beside what math-verify calls so (1,000 and 1000; 0.5 and \\frac12; 50\\% and 50; 10\\text{ cm} and 10;
    an equation and its right side): what reads the same, `18 dollars` and 18, `2 1/2` and 2.5, and a choice in any
    dress, \\text{(A)} and A. Different are, though not for math-verify, the point (1,3) and the numbers 3, 1.
    """
    wanted, given = clean(reference), clean(answer)
    if not given:
        return "unparsable"
    if wanted == given:
        return "right"
    choices = [_CHOICE.fullmatch(_TEXT.sub(r"\1", text).strip()) for text in (wanted, given)]
    if all(choices):
        first, second = (choice.group(1) for choice in choices)
        return "right" if first.lower() == second.lower() else "wrong"
    if any(_TUPLE.fullmatch(one) and _LIST.fullmatch(other) for one, other in ((wanted, given), (given, wanted))):
        return "wrong"
    from math_verify import parse, verify

    # Time is kept by the parent, who can end a computation that no signal interrupts.
    parsed = [parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None) for text in (wanted, given)]
    if not all(parsed):
        return "unparsable" if not parsed[1] else "wrong"
    return "right" if verify(*parsed, timeout_seconds=None) else "wrong"


def clean(text: str) -> str:
    """An expression without what only dresses it: dollar signs, a full stop, spaces in numbers, words behind one."""
    text = text.strip().replace("\\$", "").replace("$", "")
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", text).strip().rstrip(".").strip()
    text = _SPACE_IN_NUMBER.sub("", text)
    if words := _NUMBER_WITH_WORDS.fullmatch(text):
        text = words.group(1).strip()
    if mixed := _MIXED_NUMBER.fullmatch(text):
        sign, whole, numerator, denominator = mixed.groups()
        text = f"{sign}\\frac{{{int(whole) * int(denominator) + int(numerator)}}}{{{denominator}}}"
    return text


def main() -> None:
    """Answer requests until the input ends; the argument is the memory that this process may take, in bytes."""
    import logging

    import math_verify  # noqa: F401  (importing takes a second, which no request should pay for)

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
