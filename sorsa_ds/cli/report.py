"""The command `report`: a run as a page of HTML. Its options are in `sorsa_ds.run.report_options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _report(sys.argv[1:] if argv is None else argv))


def _report(argv: Sequence[str]) -> None:
    from sorsa_ds.run.report_options import parse

    options = parse(argv)
    from sorsa_ds.run.html_report import report_on

    report_on(options)
