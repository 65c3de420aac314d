"""The command line of launch/calibrate.py."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from sorsa_ds.config.declare import MOST_SEED, check_count
from sorsa_ds.evaluate.options import SAMPLE_TOKENS
from sorsa_ds.run.command_options import ModelDtype
from sorsa_ds.runtime.console import OptionParser

DESCRIPTION = (
    "Find the input directions that a base model uses least, for sorsa.triplets=null_space: python launch/calibrate.py "
    "--model MODEL --output FILE. By default on texts that the model writes by itself, so that it needs no data."
)


SAMPLES, BATCH_SIZE = 256, 32
"""How many texts the model writes by default, and how many at once."""

SEED = 1
"""The default seed of these texts; that of the drift's samples is 0, so that a drift is measured on other texts."""


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """The command line.

    rank: how many directions are kept of each linear, for adapters of this rank and below.
    data: a text; None: what the model writes by itself. limit: how many of its rows; None: all.
    samples: how many texts the model writes; None: `SAMPLES`.
    sample_tokens: the most tokens of such a text; None: 256, or what the model takes.
    seed: the seed of these texts; None: `SEED`.
    batch_size: how many of them the model writes at once; None: `BATCH_SIZE`.
    dtype: the dtype of weights and products. bf16 rounds a linear's inputs, and hides the least used among them.
    """

    model: str
    output: Path
    rank: int = 128
    data: str | None = None
    limit: int | None = None
    samples: int | None = None
    sample_tokens: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    dtype: ModelDtype = "fp32"
    trust_remote_code: bool = False

    def __post_init__(self):
        for name in ("rank", "samples", "sample_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None:
                check_count(f"--{name}", value)
        if self.seed is not None:
            check_count("--seed", self.seed, least=0, most=MOST_SEED)
        if self.limit is not None and self.data is None:
            raise ValueError("--limit is of a text, which --data names; what the model writes has --samples")
        for name in ("samples", "sample_tokens", "seed", "batch_size"):
            if self.data is not None and getattr(self, name) is not None:
                raise ValueError(f"--{name} is of what the model writes, and --data takes a text instead")


def parse(argv: Sequence[str]) -> CalibrateOptions:
    """Read the command line. `--help`, and what argparse refuses, end the process.

    Raises:
        ValueError: a number is out of its range, or an option goes with texts of the other kind.
    """
    parser = OptionParser(description=DESCRIPTION, argument_default=argparse.SUPPRESS)
    add, default = parser.add_argument, {field.name: field.default for field in fields(CalibrateOptions)}
    add("--model", required=True, help="the base model: folder or hub name")
    add("--output", type=Path, required=True, help="the file to write, for sorsa.directions")
    add("--rank", type=int, help=f"directions of each linear, for ranks up to this one (default: {default['rank']})")
    add("--data", help="a text instead, as `sorsa evaluate --task loss` takes it: what is to be preserved")
    add("--limit", type=int, help="only so many rows of --data")
    add("--samples", type=int, help=f"how many texts the model writes (default: {SAMPLES})")
    add("--sample_tokens", type=int, help=f"the most tokens of each (default: {SAMPLE_TOKENS}, or what it takes)")
    add("--seed", type=int, help=f"seed of what the model writes (default: {SEED})")
    add("--batch_size", type=int, help=f"texts that it writes at once (default: {BATCH_SIZE})")
    add("--dtype", choices=get_args(ModelDtype), help=f"of weights and products (default: {default['dtype']})")
    add("--trust_remote_code", action="store_true", help="allow Python code that comes with the model")
    return CalibrateOptions(**vars(parser.parse_args(argv)))
