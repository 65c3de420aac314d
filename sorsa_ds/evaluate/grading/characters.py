"""Unicode's signs as ASCII and LaTeX, so that an expression means the same whichever characters write it."""

import re
import unicodedata

_SIGNS = {
    "×": r"\times ", "✕": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "π": r"\pi ",
    "∞": r"\infty ", "≈": r"\approx ", "≃": r"\approx ", "≅": r"\approx ", "∼": "~", "≤": r"\leq ", "≥": r"\geq ",
    "≦": r"\leq ", "≧": r"\geq ", "≠": r"\neq ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ ",
    "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "⁄": "/", "∕": "/", "∗": "*", "∶": ":", "٫": ".", "٬": ",",
    "‘": "'", "’": "'", "ʼ": "'", "′": "'", "“": '"', "”": '"', "″": '"', "…": "...", "。": ".", "、": ",", "−": "-",
}  # fmt: skip
_FRACTION = re.compile(r"(\d?)([¼-¾⅐-⅞↉])")
_RAISED = re.compile(r"[⁰¹²³⁴-⁹⁺⁻]+")
_LOWERED = re.compile(r"[₀-₉]+")
_ROOT = re.compile(r"([√∛])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_UNUSUAL = re.compile(r"[ \t]*([^\x00-\x7f])")
_REMARK_DASH = re.compile(r"(?<=\w)[—―](?=[^\W\d])|(?<=[^\W\d])[—―](?=\w)")


def plain_characters(text: str) -> str:
    """The text with Unicode's signs, digits, spaces, fractions, roots and powers as ASCII or LaTeX writes them.

    `−5` is -5, `2½` is 2 1/2, `cm²` is cm^{2}, `１２` is 12 and `é` is e; a dash between words gets spaces around it.
    Emoji and what is not seen are left out. Letters of other scripts stay.
    """
    if text.isascii():
        return text
    text = _FRACTION.sub(lambda found: f"{found[1]} {_compatible(found[2])}".strip(), text)
    text = _RAISED.sub(lambda found: f"^{{{_compatible(found[0])}}}".replace("−", "-"), text)
    text = _LOWERED.sub(lambda found: f"_{{{_compatible(found[0])}}}", text)
    text = _ROOT.sub(lambda found: rf"\sqrt{'[3]' if found[1] == '∛' else ''}{{{found[2] or found[3]}}}", text)
    return "".join(map(_plain, _REMARK_DASH.sub(" - ", text)))


def undecorated(text: str) -> str:
    """The text without emoji, the spaces before them, and characters that are not seen; signs such as ° stay."""
    return _UNUSUAL.sub(lambda found: "" if found[1] not in _SIGNS and _is_decoration(found[1]) else found[0], text)


def _plain(sign: str) -> str:
    """One character as ASCII or LaTeX writes it, or as it is where they cannot."""
    category = unicodedata.category(sign)
    if sign.isascii() or sign in _SIGNS:
        return _SIGNS.get(sign, sign)
    if _is_decoration(sign):
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(sign))
    if category in ("Zs", "Zl", "Zp"):
        return " "
    if category == "Pd":
        return "-"
    if unicodedata.decomposition(sign).startswith(("<wide>", "<narrow>", "<font>")):
        return "".join(map(_plain, _compatible(sign)))
    bare = unicodedata.normalize("NFD", sign)[0]
    return bare if bare.isascii() and bare.isalpha() else sign


def _is_decoration(sign: str) -> bool:
    """Whether a character is an emoji, part of one, an accent that stands apart, or not seen."""
    return unicodedata.category(sign) in ("So", "Sk", "Cf", "Cs", "Co", "Mn", "Me") and not sign.isascii()


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("⁄", "/")
