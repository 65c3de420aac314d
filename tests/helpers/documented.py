"""The commands that the README and docs/ show, word by word."""

import re
import shlex
from pathlib import Path

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[str]:
    """The shell code of a Markdown text."""
    return BLOCK.findall(text)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    level = heading.split()[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section {heading!r}"
    return found[1]


def commands(file: Path) -> list[list[str]]:
    """The words of every command of a page, without comments and without variables that are set for it alone."""
    found = []
    for block in blocks(file.read_text(encoding="utf-8")):
        pending = ""
        for line in block.replace("\\\n", " ").splitlines():
            pending = f"{pending}\n{line}" if pending else line
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            pending = ""
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            found += [words] if words else []
        assert not pending, f"{file}: a quotation has no end: {pending}"
    return found
