"""The command `check`: look for mistakes in another command without starting it.

    python launch/check.py train RANKS RANKS_OF_EACH_NODE [the arguments of launch/train.py]
    python launch/check.py evaluate [the arguments of launch/evaluate.py]

RANKS_OF_EACH_NODE is 0 where nodes differ. Prints the name of the run (output.name) or the model; an empty line where
the run has none. What is wrong goes to stderr, with exit code 2.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _check(sys.argv[1:] if argv is None else argv))


def _check(argv: Sequence[str]) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here: DeepSpeed need not look for a GPU
    command, *words = argv
    with redirect_stdout(sys.stderr):  # where libraries warn; stdout has the name alone
        name = _train(int(words[0]), int(words[1]), words[2:]) if command == "train" else _evaluate(words)
    print(name)


def _train(world_size: int, node_ranks: int, argv: Sequence[str]) -> str:
    """The name of the run, or an empty text, after everything that can be checked without its machine is checked."""
    from sorsa_ds.train.options import parse

    invocation = parse(argv, tell=lambda text: None)  # the command itself will tell
    from sorsa_ds.train.first_checks import check_first

    check_first(invocation, logs=False)  # which node will write the logs is not known here
    from sorsa_ds.train.before_launch import check_invocation

    check_invocation(invocation, world_size, node_ranks)
    return invocation.config.output.name or ""


def _evaluate(argv: Sequence[str]) -> str:
    """The name of the model, after it is found to be there as far as that can be told without the hub."""
    from sorsa_ds.evaluate.options import parse

    options = parse(argv)
    from sorsa_ds.evaluate.models import check_model

    check_model(options.model, options.checkpoint)
    return options.model
