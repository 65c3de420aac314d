"""The command line of launch/analyze.py."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.run.command_options import add_base_options
from sorsa_ds.runtime.console import OptionParser

DESCRIPTION = """\
Analyse finished runs: `python launch/analyze.py --run runs/A [--run runs/B ...] --output DIR`.

Singular values and vectors of the adapted weights at every stored step (training stores with analysis.every=N): a CSV
table, the papers' figures and one HTML report. Needs no GPU. The same command goes on where it was interrupted.
"""

DTYPES = "float64", "float32"
"""Values of --dtype, PyTorch's names; the command line is read before PyTorch is imported, which takes seconds."""

DTYPE = "float64"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's options. None stands for one that was not given."""

    run: Sequence[Path]
    output: Path
    base: str | None = None
    workers: int | None = None
    dtype: str = DTYPE
    rank: int | None = None
    trust_remote_code: bool = False


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. `--help`, and what argparse refuses, end the process."""
    parser = OptionParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    told = " or ".join(f"{name} (default)" if name == DTYPE else name for name in DTYPES)
    add("--run", type=Path, required=True, action="append", help="a finished run's folder; repeat it")
    add("--output", type=Path, required=True, help="folder of tables, pictures and report")
    add_base_options(parser, code=", where runs used it")
    add("--workers", type=int, help="processes (default: as many as cores and free memory allow)")
    add("--dtype", default=DTYPE, help=f"dtype of the decompositions: {told}")
    add("--rank", type=int, help="leading triplets whose subspaces are compared (default: adapter.rank)")
    return Options(**vars(parser.parse_args(argv)))
