"""Currencies beside numbers: `US$12`, `€12`, `12 EUR`, `Rs. 500`."""

import re
import unicodedata

_SIGNS = {"€": "euro", "£": "pound", "¢": "cent", "¥": "yen", "₹": "rupee", "₽": "ruble", "₩": "won", "₫": "dong",
          "₱": "peso", "₺": "lira", "฿": "baht", "₴": "hryvnia", "₦": "naira", "₪": "shekel"}  # fmt: skip
_CODES = {"USD": "dollar", "EUR": "euro", "GBP": "pound", "JPY": "yen", "CNY": "yuan", "RMB": "yuan", "INR": "rupee",
          "RS": "rupee", "CAD": "dollar", "AUD": "dollar", "NZD": "dollar", "HKD": "dollar", "SGD": "dollar",
          "CHF": "franc", "SEK": "krona", "NOK": "krone", "DKK": "krone", "MXN": "peso", "BRL": "real", "KRW": "won",
          "ZAR": "rand", "PHP": "peso", "NGN": "naira", "KES": "shilling", "THB": "baht", "TRY": "lira",
          "PLN": "zloty", "RUB": "ruble", "VND": "dong", "IDR": "rupiah", "MYR": "ringgit", "AED": "dirham",
          "SAR": "riyal", "ILS": "shekel", "EGP": "pound"}  # fmt: skip
_NAMES = frozenset({*_SIGNS.values(), *_CODES.values()})
_OF_A_COUNTRY = r"(?<![\w$\\])(?:US|U\.S\.|CA|AU|NZ|HK|SG|MX|NT|C|A|S|R)\s?\\?\$(?=\s*[-+]?\.?\d)"
_CODE = rf"(?<![A-Za-z\\])(?:{'|'.join(_CODES)}|Rs)\b\.?\s*(?=[-+]?[$\\€£¥]*\.?\d)"
_BEFORE = re.compile(rf"{_OF_A_COUNTRY}|{_CODE}")
_BEHIND = re.compile(rf"(?<=\d)\s*(?:{'|'.join(_CODES)})\b")
_DOLLAR = re.compile(rf"{_OF_A_COUNTRY}|\\\$")
_WORD = re.compile("[A-Za-z]+")


def without_currency(text: str) -> str:
    """The text without signs and codes of currencies beside its numbers; dollar signs, which LaTeX needs, stay."""
    text = _BEHIND.sub("", _BEFORE.sub("", text))
    return "".join(sign for sign in text if sign.isascii() or unicodedata.category(sign) != "Sc")


def currencies(text: str) -> set[str]:
    """The names of the currencies that a text has, by word, code or sign: `$5.50 (or 550 cents)` has dollar and cent.

    A dollar sign is one where it is escaped, or where there is no second that would make a formula of the text between.
    """
    found = {_SIGNS[sign] for sign in text if sign in _SIGNS}
    for word in _WORD.findall(text):
        name = _CODES.get(word) or word.lower().removesuffix("s")
        if name in _NAMES:
            found.add(name)
    if _DOLLAR.search(text) or text.replace(r"\$", "").count("$") % 2:
        found.add("dollar")
    return found
