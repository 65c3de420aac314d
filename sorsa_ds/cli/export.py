"""The command `export`: write a finished run as a model or an adapter. Its options are in `sorsa_ds.export.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _export(sys.argv[1:] if argv is None else argv))


def _export(argv: Sequence[str]) -> None:
    from sorsa_ds.export.options import parse

    options = parse(argv)
    from sorsa_ds.export.command import export

    export(options)
