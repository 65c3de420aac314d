"""Options that several commands on trained models have: each is declared once, and means the same in all of them."""

import argparse
from typing import Literal, get_args

ModelDtype = Literal["auto", "bf16", "fp32"]
"""Values of `--dtype` of the commands that run a model."""


def add_base_options(parser: argparse.ArgumentParser, base: str = "", code: str = "") -> None:
    """Add `--base` and `--trust_remote_code`.

    Args:
        base: what else `--base` means to this command, as the rest of a sentence.
        code: what else the command does with the model's Python code, as the rest of a sentence.
    """
    add = parser.add_argument
    add("--base", help=f"folder or hub name of the base model, where it has moved{base}")
    allowed = f"allow Python code that comes with the model or its base model{code}"
    add("--trust_remote_code", action="store_true", help=allowed)


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Add `--checkpoint`."""
    parser.add_argument(
        "--checkpoint", metavar="latest|best|STEP",
        help="take a run as it was at this checkpoint, also while it trains or after it was stopped (default: its end)",
    )  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser, base: str = "") -> None:
    """Add what says which model is run, and in which dtype: `--model`, `--dtype`, and what runs and adapters need.

    Args:
        base: what else `--base` means to this command, as the rest of a sentence.
    """
    add = parser.add_argument
    add("--model", required=True, help="run, adapter (SORSA's or PEFT's), folder of a model, or hub name")
    add_checkpoint_option(parser)
    add_base_options(parser, base)
    add(
        "--dtype", choices=get_args(ModelDtype),
        help="dtype of weights and products (default: auto, which is bf16 on hardware that is fast at it)",
    )  # fmt: skip
