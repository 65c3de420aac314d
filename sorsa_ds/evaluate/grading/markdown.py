"""Markdown and simple HTML as the plain text that a reader sees."""

import html
import re

_EMPHASIS = re.compile(r"(?<![\w*)}\]])(\*{1,3}|__?)(?=\S)([^*_\n]+?)(?<=\S)\1(?![\w*])")
_CODE = re.compile(r"```\w*\n?|`")
_STRUCK = re.compile(r"~~[^~\n]+~~[ \t]*|<(del|s|strike)>[^<]*</\1>[ \t]*")
_RAISED = re.compile(r"<sup>([^<]*)</sup>")
_TAG = re.compile(r"</?(?:b|i|u|em|strong|code|mark|p|span|ins|small|big)>|<br ?/?>$", re.MULTILINE)
_ENTITY = re.compile(r"&(?:[a-z]{2,8}|#\d{2,5});")


def plain_markdown(text: str) -> str:
    """The text without marks of emphasis and code, and without what is struck through."""
    if "<" in text or "&" in text:
        text = _ENTITY.sub(lambda found: html.unescape(found[0]), text)
        text = _TAG.sub("", _RAISED.sub(r"^{\1}", _STRUCK.sub("", text)))
    return _EMPHASIS.sub(r"\2", _CODE.sub("", _STRUCK.sub("", text)))
