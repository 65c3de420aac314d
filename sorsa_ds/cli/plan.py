"""The command `plan`: what a run will need. Its options are in `sorsa_ds.plan.options`."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from sorsa_ds.runtime import exit_codes

DOES_NOT_FIT = 3
"""The exit code where the planned run does not fit."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _plan(sys.argv[1:] if argv is None else argv))


def _plan(argv: Sequence[str]) -> None:
    from sorsa_ds.plan.options import parse

    request = parse(argv)
    from sorsa_ds.plan.configuration import configuration_of

    configuration_of(request.config.model, request.config.loading)  # a wrong name shows before libraries take seconds
    from sorsa_ds.runtime.console import quiet_libraries

    with redirect_stdout(sys.stderr):  # DeepSpeed's logger keeps the stream that its import finds: --json owns stdout
        quiet_libraries()
    from sorsa_ds.plan.command import print_plan

    if not print_plan(request):
        sys.stdout.flush()
        sys.exit(DOES_NOT_FIT)
