"""Plan a run: `python launch/plan.py --config RECIPE --ds_config JSON --gpus N --nodes M [--json]`."""

import sys
from contextlib import redirect_stdout

from sorsa_ds.runtime import exit_codes


def main() -> None:
    """Parse, plan, print; exit code 3 where it does not fit."""
    from sorsa_ds.runtime.console import quiet_libraries

    with redirect_stdout(sys.stderr):  # DeepSpeed's logger keeps the stream that its import finds: --json owns stdout
        quiet_libraries()
    from sorsa_ds.plan.command import run

    if not run(sys.argv[1:]):
        sys.stdout.flush()
        sys.exit(3)


if __name__ == "__main__":
    exit_codes.run(main)
