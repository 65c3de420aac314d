"""The final answer inside a text: the papers' rule, and how the data sets mark their references."""

import re

from sorsa_ds.evaluate.grading.characters import undecorated
from sorsa_ds.evaluate.grading.markdown import plain_markdown

ANNOUNCEMENT = "The answer is:"
"""The words before the answer in the papers' training data."""

_SAYS = r"(?i:the (?:final )?answer is)"
_COLON = r"[ \t]?[:\uff1a]"
_ANNOUNCED = re.compile(_SAYS + _COLON + r"(?=(?:\s*(?=\$)|[ \t]*\n?[ \t]*)(.*))")
_SAID = re.compile(_SAYS + r"(?=[ \t]+(.*))")
_MARKED = re.compile(r"^####[ \t]*(.+)$", re.MULTILINE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(\S+?)(?=[\s$.]|$)")
_FORMULA = re.compile(r"(?<!\\)\\\[(.+?)\\\]|\$\$(.+?)\$\$|(?<!\\)\\\((.+?)\\\)", re.DOTALL)
_BELOW = re.compile(
    rf"({_SAYS}(?:{_COLON})?(?:\*{{1,3}}|__)?)[ \t]*\n\s*(?:[>*\u2022]\s+)*"
    r"(?=(\*{1,3}|__?)[^*_\n]+\2[ \t.!]*$|(?:[A-Z]{2,3}\s?)?[^\w\s.,:;!?'\"()|#]{0,3}\.?\d)",
    re.MULTILINE,
)
_ABBREVIATION = r"(?<!\bM[rs])(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bU\.S)(?<!\b[Aa]pprox)"
_END_OF_SENTENCE = re.compile(_ABBREVIATION + r"\.(?=\$?(?:\s+[(\"]?[A-Z]|\s*$))|(?<=!)(?=\$?(?:\s+[A-Z]|\s*$))")
_EXCLAIMED = re.compile(r"(\d?)!$")
_REASON = re.compile(r"[,;]?(?<=\S)(?<!\bor)\s+(?:so|because|since|which|therefore|thus|hence)\b.*")


def announced(text: str) -> str | None:
    """The answer of a generated text; None where it gives none.

    By the papers' rule it is what follows the last `The answer is:`, up to the end of the sentence or line. A text
    without these words may mark its answer as the references do, by the last `\\boxed{...}` or `#### ...`, or say it
    without the colon. It may stand further below where it is a number or its line is emphasised. Markdown's emphasis
    and code, and formulas on lines of their own, are read as plain text.
    """
    text = _plain(text)
    return _last_of(_ANNOUNCED, text) or boxed(text) or marked(text) or _last_of(_SAID, text)


def _plain(text: str) -> str:
    text = plain_markdown(_BELOW.sub(r"\1 ", undecorated(text)))
    return _FORMULA.sub(lambda found: f"${' '.join(''.join(filter(None, found.groups())).split())}$", text)


def _last_of(announcement: re.Pattern, text: str) -> str | None:
    found = announcement.findall(text)
    sentence = _END_OF_SENTENCE.split(found[-1], maxsplit=1)[0].strip() if found else ""
    return boxed(sentence) or _EXCLAIMED.sub(_apart, _REASON.sub("", sentence)) or None


def _apart(mark: re.Match) -> str:
    """The exclamation mark behind an answer: removed, or behind a number set apart by a space.

    Behind a number it may end the sentence or mean a factorial, which `equality.grade_answer` decides.
    """
    return f"{mark[1]} !" if mark[1] else ""


def marked(text: str) -> str | None:
    """The text behind the last `####` at the beginning of a line, where GSM-8K's references have the answer."""
    found = _MARKED.findall(text)
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` with balanced braces, where MATH's references have the answer."""
    for match in reversed(list(_BOXED.finditer(text))):
        content = match.group(1) or _in_braces(text, match.end())
        if content and content.strip():
            return content.strip()
    return None


def _in_braces(text: str, start: int) -> str | None:
    """The text inside of the braces that open at `start`; None where they are never closed."""
    depth = 0
    for position in range(start, len(text)):
        escaped = position > 0 and text[position - 1] == "\\"
        if text[position] in "{}" and not escaped:
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position]
    return None
