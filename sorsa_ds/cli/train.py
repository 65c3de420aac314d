"""The command `train`: fine-tune a model. Its options are in `sorsa_ds.train.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes
from sorsa_ds.runtime.leave import leave_when_told


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _train(sys.argv[1:] if argv is None else argv))


def _train(argv: Sequence[str]) -> None:
    from sorsa_ds.runtime.console import ask_for_details, say
    from sorsa_ds.train.options import parse

    invocation = parse(argv)
    leave_when_told()
    if invocation.verbose:
        ask_for_details()
    from sorsa_ds.train.first_checks import check_first, on_one_node

    if on_one_node():  # where every rank finds the same; else the preflight looks, which can tell the other nodes
        check_first(invocation, logs=True)
    say("Loading PyTorch, transformers and DeepSpeed ...")
    from sorsa_ds.runtime.device import grow_segments

    grow_segments()  # before the next import, which may start CUDA
    from sorsa_ds.train.report import show_report
    from sorsa_ds.train.setup import assemble

    trainer = assemble(invocation)
    show_report(trainer.train(), trainer.folder)
