"""The command `analyze`: measure the weights of finished runs. Its options are in `sorsa_ds.study.analysis.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _analyze(sys.argv[1:] if argv is None else argv))


def _analyze(argv: Sequence[str]) -> None:
    from sorsa_ds.study.analysis.options import parse

    options = parse(argv)
    from sorsa_ds.study.analysis.command import analyze

    analyze(options)
