"""The command `compare`: train several methods alike. Its options are in `sorsa_ds.study.compare.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _compare(sys.argv[1:] if argv is None else argv))


def _compare(argv: Sequence[str]) -> None:
    from sorsa_ds.study.compare.options import parse

    request = parse(argv)
    from sorsa_ds.study.compare.command import compare

    compare(request)
