"""Export a finished run: `python launch/export.py --run runs/NAME --format FORMAT --output FOLDER`."""

import argparse
from pathlib import Path

from sorsa_ds.runtime import exit_codes


def main() -> None:
    """Parse, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run folder that launch/train.py wrote")
    parser.add_argument(
        "--format", choices=("merged", "lora", "base", "adapter"), required=True,
        help="merged: a plain Hugging Face model; lora: for the untouched base model, in PEFT's format; "
             "base: over a quantised residual, the model on which the LoRA is exact; "
             "adapter: U, s and V themselves, for sorsa_ds.load_adapter",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder to make; it must not hold anything")
    parser.add_argument("--base", help="folder or hub name of the base model, where it has moved")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="merged, base: of the weights (auto: the base's)",
    )
    parser.add_argument(
        "--quantize",
        choices=("nf4", "nf4_double", "int8"),
        help="merged: in 4 or 8 bits, for transformers and bitsandbytes",
    )
    parser.add_argument("--max_shard_size", help="merged, base: largest file, as 500MB (default 5GB)")
    parser.add_argument("--rank", type=int, help="lora: cut it to this rank (default: twice the trained one, exact)")
    parser.add_argument("--push_to_hub", metavar="NAME", help="publish the folder as this model")
    parser.add_argument("--private", action="store_true", help="... which only you can see")
    given = parser.parse_args()

    from sorsa_ds.export.command import Options, export

    export(Options(**vars(given)))


if __name__ == "__main__":
    exit_codes.run(main)
