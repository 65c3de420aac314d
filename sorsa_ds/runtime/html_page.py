"""Pages of HTML that open from the disk: one file each, which needs no network and runs no script.

Texts of others, such as names, rows and answers of models, stand in them as text and nothing else.
"""

import base64
import html
from collections.abc import Iterable

from sorsa_ds.runtime.console import printable

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for such a page: the pictures and the style that are in it."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-top: 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
.told { white-space: pre-wrap; text-align: left; max-width: 60rem; overflow-wrap: anywhere; }
figcaption, .note { color: #555; font-size: 13px; } @media print { details { display: none; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page with a title, from parts that are HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{safe(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{safe(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def table(headings: Iterable[str], rows: Iterable[list]) -> str:
    """A table. Numbers stand on the right, texts on the left; None is a dash.

    Args:
        headings: none: the table has no head.
    """
    head = "".join(f"<th>{safe(heading)}</th>" for heading in headings)
    above = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{above}<tbody>\n{body}\n</tbody></table></div>'


def figure(png: bytes, title: str, caption: str = "") -> str:
    """A picture, which is a part of the page."""
    image = base64.b64encode(png).decode()
    below = f"<figcaption>{safe(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{safe(title)}" src="data:image/png;base64,{image}">{below}</figure>'


def safe(text: str) -> str:
    """A text as HTML that shows it, whatever stands in it; controls, such as those of direction, are escaped."""
    return html.escape(printable(text), quote=True)


class Told(str):
    """A text of several lines in a table: its lines and spaces stay."""


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"<td>{value:.4g}</td>"
    text = "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    kind = ' class="told"' if isinstance(value, Told) else ' class="text"' if isinstance(value, str) else ""
    return f"<td{kind}>{safe(text)}</td>"
