"""The command `preview`: what a run will learn from. Its options are in `sorsa_ds.preview.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _preview(sys.argv[1:] if argv is None else argv))


def _preview(argv: Sequence[str]) -> None:
    from sorsa_ds.preview.options import parse

    request = parse(argv)
    from sorsa_ds.train.first_checks import check_inputs

    check_inputs(request.config)
    from sorsa_ds.runtime.console import quiet_data_libraries

    quiet_data_libraries()
    from sorsa_ds.preview.command import show

    show(request)
