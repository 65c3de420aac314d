"""Evaluate: `deepspeed launch/evaluate.py --model runs/NAME --task gsm8k`; torchrun or python alone start it too."""

import sys

from sorsa_ds.runtime import exit_codes


def main() -> None:
    """Parse, evaluate."""
    from sorsa_ds.evaluate.options import parse

    options = parse(sys.argv[1:])
    from sorsa_ds.evaluate.command import evaluate

    evaluate(options)


if __name__ == "__main__":
    exit_codes.run(main)
