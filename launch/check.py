"""Check a command without starting it:

    python launch/check.py train RANKS RANKS_OF_EACH_NODE [the arguments of launch/train.py]
    python launch/check.py evaluate [the arguments of launch/evaluate.py]

RANKS_OF_EACH_NODE is 0 where nodes differ. Prints the name of the run (output.name) or the model; an empty line where
the run has none. What is wrong goes to stderr, with exit code 2.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace


def train(world_size: int, node_ranks: int, argv: Sequence[str]) -> str:
    """Everything that training refuses before it looks at the machine; returns the run's name.

    Raises:
        ValueError: a setting, file or folder, or the number of ranks, is wrong.
    """
    from sorsa_ds.config import deepspeed_json
    from sorsa_ds.train.invocation import parse

    invocation = parse(argv)
    settings = invocation.config.train
    if invocation.resume:
        from sorsa_ds.run.checkpoint import resume

        if invocation.resume != resume.AUTO:
            resume.named_folder(invocation.resume)
        # They are regrouped for the ranks that there are.
        settings = replace(settings, micro_batch_size=None, gradient_accumulation_steps=None)
    raw = deepspeed_json.read_ds_config(invocation.ds_config)
    deepspeed_json.check_zero_keys(raw, invocation.ds_config)
    said = settings.precision if settings.precision != "auto" else deepspeed_json.precision_from_json(raw)
    deepspeed_json.resolve_ds_config(raw, settings, world_size, "cuda", said or "fp32", node_ranks)
    return invocation.config.output.name or ""


def evaluate(argv: Sequence[str]) -> str:
    """The options, and whether the model is there, as far as that can be told without the hub; returns its name.

    Raises:
        ValueError: an option is invalid, or the model does not exist.
    """
    from sorsa_ds.evaluate import models, options

    model = options.parse(argv).model
    models.check_model(model)
    return model


def main() -> None:
    """Check what the first word says."""
    command, *words = sys.argv[1:]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here: DeepSpeed need not look for a GPU
    try:
        with redirect_stdout(sys.stderr):  # where libraries warn; stdout has the name alone
            name = train(int(words[0]), int(words[1]), words[2:]) if command == "train" else evaluate(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(name)


if __name__ == "__main__":
    main()
