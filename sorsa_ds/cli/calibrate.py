"""The command `calibrate`: find the inputs that a base model uses least.

Its options are in `sorsa_ds.evaluate.calibrate_options`.
"""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _calibrate(sys.argv[1:] if argv is None else argv))


def _calibrate(argv: Sequence[str]) -> None:
    from sorsa_ds.evaluate.calibrate_options import parse

    options = parse(argv)
    from sorsa_ds.evaluate.calibrate import calibrate

    calibrate(options)
