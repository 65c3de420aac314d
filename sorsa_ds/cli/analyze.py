"""The command `analyze`: measure the adapted weights of finished runs. Its options are declared here."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sorsa_ds.runtime import exit_codes

DESCRIPTION = """\
Analyse finished runs: `python launch/analyze.py --run runs/A [--run runs/B ...] --output DIR`.

Singular values and vectors of the adapted weights at every stored step (training stores with analysis.every=N): a CSV
table, the papers' figures and one HTML report. Needs no GPU. The same command goes on where it was interrupted.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _analyze(sys.argv[1:] if argv is None else argv))


def _analyze(argv: Sequence[str]) -> None:
    given = parser().parse_args(argv)

    from sorsa_ds.study.analysis.command import analyze
    from sorsa_ds.study.analysis.request import Options

    analyze(Options(**vars(given)))


def parser() -> argparse.ArgumentParser:
    """Reads the options; their names are those of `sorsa_ds.study.analysis.request.Options`."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, action="append", help="a finished run's folder; repeat it")
    add("--output", type=Path, required=True, help="folder of tables, pictures and report")
    add("--base", help="folder or hub name of the base model, where it has moved")
    add("--workers", type=int, help="processes (default: as many as cores and free memory allow)")
    add("--dtype", default="float64", help="of the decompositions: float64 (default) or float32")
    add("--rank", type=int, help="leading triplets whose subspaces are compared (default: sorsa.rank)")
    return parser
