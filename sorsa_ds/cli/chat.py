"""The command `chat`: ask a model. Its options are in `sorsa_ds.evaluate.chat_options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _chat(sys.argv[1:] if argv is None else argv))


def _chat(argv: Sequence[str]) -> None:
    from sorsa_ds.evaluate.chat_options import parse

    options = parse(argv)
    from sorsa_ds.evaluate.chat import chat

    chat(options)
