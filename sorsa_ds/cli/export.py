"""The command `export`: write a finished run as a model or an adapter. Its options are declared here."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sorsa_ds.runtime import exit_codes

DESCRIPTION = "Export a finished run: `python launch/export.py --run runs/NAME --format FORMAT --output FOLDER`."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _export(sys.argv[1:] if argv is None else argv))


def _export(argv: Sequence[str]) -> None:
    given = parser().parse_args(argv)

    from sorsa_ds.export.command import Options, export

    export(Options(**vars(given)))


def parser() -> argparse.ArgumentParser:
    """Reads the options; their names are those of `sorsa_ds.export.options.Options`."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the run folder that launch/train.py wrote")
    add(
        "--format", choices=("merged", "lora", "base", "adapter"), required=True,
        help="merged: a plain Hugging Face model; lora: for the untouched base model, in PEFT's format; "
             "base: over a quantised residual, the model on which the LoRA is exact; "
             "adapter: U, s and V themselves, for sorsa_ds.load_adapter",
    )  # fmt: skip
    add("--output", type=Path, required=True, help="folder to make; it must not hold anything")
    add("--base", help="folder or hub name of the base model, where it has moved")
    add(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"),
        help="merged, base: of the weights (auto: the base's)",
    )  # fmt: skip
    add(
        "--quantize", choices=("nf4", "nf4_double", "int8"),
        help="merged: in 4 or 8 bits, for transformers and bitsandbytes",
    )  # fmt: skip
    add("--max_shard_size", help="merged, base: largest file, as 500MB (default 5GB)")
    add("--rank", type=int, help="lora: cut it to this rank (default: twice the trained one, exact)")
    add("--push_to_hub", metavar="NAME", help="publish the folder as this model")
    add("--private", action="store_true", help="with --push_to_hub: only you can see the model")
    return parser
