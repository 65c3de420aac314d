"""The command `evaluate`: measure a model. Its options are in `sorsa_ds.evaluate.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _evaluate(sys.argv[1:] if argv is None else argv))


def _evaluate(argv: Sequence[str]) -> None:
    from sorsa_ds.evaluate.options import parse

    options = parse(argv)
    from sorsa_ds.evaluate.command import evaluate

    evaluate(options)
