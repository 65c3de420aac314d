"""Train: `deepspeed launch/train.py --ds_config ds_configs/zero3.json [--config run.yaml] [sorsa.rank=64 ...]`."""

import sys

from sorsa_ds.runtime import exit_codes
from sorsa_ds.runtime.stop_signals import leave_when_told


def main() -> None:
    """Parse, assemble, train, report."""
    from sorsa_ds.train.invocation import parse

    invocation = parse(sys.argv[1:])
    leave_when_told()

    from sorsa_ds.train.report import show
    from sorsa_ds.train.setup import assemble

    trainer = assemble(invocation)
    show(trainer.train(), trainer.folder)


if __name__ == "__main__":
    exit_codes.run(main)
