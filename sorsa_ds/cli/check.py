"""The command `check`: look for mistakes in another command without starting it.

    sorsa check train [--gpus N] [the arguments of `sorsa train`]
    sorsa check evaluate [the arguments of `sorsa evaluate`]

Prints the name of the run (output.name) or the model; an empty line where the run has none. What is wrong goes to
stderr, with exit code 2. Without --gpus, the ranks are those that `sorsa train` would start on this machine. Several
nodes: sorsa check train RANKS RANKS_OF_EACH_NODE [settings], as the scripts of launch/ call it; RANKS_OF_EACH_NODE is 0
where nodes differ.
"""

import difflib
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from sorsa_ds.cli.sorsa import gpus_taken
from sorsa_ds.runtime import exit_codes
from sorsa_ds.runtime.shipped import SHIPPED

_COMMANDS = ("train", "evaluate")
_RANKS_HERE = 'set -eu; repository=$1; . "$1/launch/common.sh"; if has_gpu; then count_gpus; else echo 2; fi'
"""The bash command that prints how many ranks launch/multi_gpu.sh starts on this machine."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _check(sys.argv[1:] if argv is None else argv))


def _check(argv: Sequence[str]) -> None:
    if not argv:
        raise ValueError(f"sorsa check: name the command that is to be checked, {' or '.join(_COMMANDS)}")
    if argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, *words = argv
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean sorsa check {near[0]}?" if near else f"it checks {' and '.join(_COMMANDS)}"
        raise ValueError(f"sorsa check knows no command {command}: {hint}")
    with redirect_stdout(sys.stdout if {"-h", "--help"} & {*words} else sys.stderr):  # libraries warn on stdout
        name = _train(*_ranks(words)) if command == "train" else _evaluate(words)
    print(name)


def _ranks(words: Sequence[str]) -> tuple[int, int, list[str]]:
    """The number of ranks, that of each node, and the arguments of the training command.

    Raises:
        ValueError: a number is missing, or is none that a run can have.
    """
    numbers = 0
    while numbers < len(words) and words[numbers].isdecimal():
        numbers += 1
    if numbers:
        if numbers != 2 or not int(words[0]):
            given = " ".join(words[:numbers])
            raise ValueError(
                f"sorsa check train {given}: two numbers are needed, RANKS from 1 and RANKS_OF_EACH_NODE (0: nodes "
                f"differ); on one machine say --gpus N instead"
            )
        return int(words[0]), int(words[1]), list(words[2:])
    gpus, rest = gpus_taken(list(words))
    ranks = _ranks_here() if gpus is None else gpus
    if gpus == 1 and not any(word.startswith(("--ds_config", "--resume")) for word in rest):
        rest = ["--ds_config", "ds_configs/stage0.json", *rest]  # as launch/single_gpu.sh starts it
    return ranks, ranks, rest


def _ranks_here() -> int:
    """How many ranks `sorsa train` starts on this machine: a rank on each GPU, or two on its CPUs."""
    command = ["bash", "-c", _RANKS_HERE, "-", str(SHIPPED)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _train(world_size: int, node_ranks: int, argv: Sequence[str]) -> str:
    """The name of the run, or an empty text, after everything that can be checked without its machine is checked."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here: DeepSpeed need not look for a GPU
    from sorsa_ds.train.options import parse

    invocation = parse(argv, tell=lambda text: None)  # the command itself will tell
    from sorsa_ds.train.first_checks import check_first

    check_first(invocation, logs=False)  # which node will write the logs is not known here
    from sorsa_ds.train.before_launch import check_invocation

    check_invocation(invocation, world_size, node_ranks)
    return invocation.config.output.name or ""


def _evaluate(argv: Sequence[str]) -> str:
    """The name of the model, after it is found to be there as far as that can be told without the hub."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here: DeepSpeed need not look for a GPU
    from sorsa_ds.evaluate.options import parse

    options = parse(argv)
    from sorsa_ds.evaluate.models import check_model

    check_model(options.model, options.checkpoint)
    return options.model
