"""Analyse finished runs: `python launch/analyze.py --run runs/A [--run runs/B ...] --output DIR`.

Singular values and vectors of the adapted weights at every stored step (training stores with analysis.every=N): a CSV
table, the papers' figures and one HTML report. Needs no GPU. The same command goes on where it was interrupted.
"""

import argparse
from pathlib import Path

from sorsa_ds.runtime import exit_codes


def main() -> None:
    """Parse, analyse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, action="append", help="a finished run's folder; repeat it")
    parser.add_argument("--output", type=Path, required=True, help="folder of tables, pictures and report")
    parser.add_argument("--base", help="folder or hub name of the base model, where it has moved")
    parser.add_argument("--workers", type=int, help="processes (default: as many as cores and free memory allow)")
    parser.add_argument("--dtype", default="float64", help="of the decompositions: float64 (default) or float32")
    parser.add_argument("--rank", type=int, help="leading triplets whose subspaces are compared (default: sorsa.rank)")
    given = parser.parse_args()

    from sorsa_ds.study.analysis.command import analyze
    from sorsa_ds.study.analysis.request import Options

    analyze(Options(**vars(given)))


if __name__ == "__main__":
    exit_codes.run(main)
