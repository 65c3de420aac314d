"""The command line of launch/report.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.run.paths import PAGE
from sorsa_ds.runtime.console import OptionParser

DESCRIPTION = (
    "Write a run as a page of HTML that opens from the disk: python launch/report.py --run runs/NAME. A run that "
    "trains or was stopped is shown as far as it has come; a finished one has its page already."
)


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """The command line. output: the page's file; None: report.html in the run's folder."""

    run: Path
    output: Path | None


def parse(argv: Sequence[str]) -> ReportOptions:
    """Read the command line. `--help`, and what argparse refuses, end the process."""
    parser = OptionParser("report.py", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--run", required=True, type=Path, help="the run's folder")
    parser.add_argument("--output", type=Path, help=f"file of the page (default: {PAGE} in the run's folder)")
    given = parser.parse_args(argv)
    output = None if given.output is None else given.output.expanduser().absolute()
    return ReportOptions(given.run.expanduser().absolute(), output)
