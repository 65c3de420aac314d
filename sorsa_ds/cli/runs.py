"""The command `runs`: what runs a folder holds. Its options are in `sorsa_ds.study.runs.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _runs(sys.argv[1:] if argv is None else argv))


def _runs(argv: Sequence[str]) -> None:
    from sorsa_ds.study.runs.options import parse

    options = parse(argv)
    from sorsa_ds.study.runs.command import list_runs

    list_runs(options)
