"""The command line of launch/runs.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.config.watch_settings import OutputConfig
from sorsa_ds.runtime.console import OptionParser

DESCRIPTION = "Show the runs of a folder side by side, the last active first: python launch/runs.py [FOLDER] [--json]."


@dataclass(frozen=True, slots=True)
class RunsOptions:
    """The command line. folder: holds run folders, or is one. as_json: print a list of objects instead of a table."""

    folder: Path
    as_json: bool


def parse(argv: Sequence[str]) -> RunsOptions:
    """Read the command line. `--help`, and what argparse refuses, end the process."""
    parser = OptionParser("runs.py", description=DESCRIPTION, allow_abbrev=False)
    default = OutputConfig().folder
    parser.add_argument("folder", nargs="?", default=default, help=f"folder of runs (default {default}), or one run")
    parser.add_argument("--json", action="store_true", help="a list of objects, with all numbers and full paths")
    given = parser.parse_args(argv)
    return RunsOptions(Path(given.folder).expanduser().absolute(), given.json)
