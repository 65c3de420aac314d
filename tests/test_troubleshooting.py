"""The page on messages shows messages as the program has them."""

import ast
import re

from tests.helpers.projects import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SHOWN = re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def template(node: ast.expr) -> str:
    """A text of the sources with `…` where values are filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    return "…"


def texts() -> list[str]:
    """All texts of the package's sources."""
    nodes = (node for path in (ROOT / "sorsa_ds").rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return [template(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]


def test_every_message_of_the_page_is_one_of_the_program():
    assert len(SHOWN) > 15
    known = texts()
    for message in SHOWN:
        begin = message.removeprefix("… ").removesuffix("…").rstrip(" ")
        assert any(begin in text for text in known), f"the program has no message {message!r}"
