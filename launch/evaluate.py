"""Measure a finished run's held-out loss from its adapter: `python launch/evaluate.py --run runs/NAME`."""

import argparse
import json
from pathlib import Path

from sorsa_ds import failure


def main() -> None:
    """Parse, reload, measure, compare with the run's own report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run folder that launch/train.py wrote")
    parser.add_argument("--local_rank", type=int, default=0, help="added by DeepSpeed's launcher; ignored")
    folder = parser.parse_args().run

    from sorsa_ds.console import say
    from sorsa_ds.evaluate import held_out_loss

    loss = held_out_loss(folder)
    say(f"held-out loss: {loss:.6f} nats per token")
    report = folder / "report.json"
    if report.exists():
        say(f"the run reported: {json.loads(report.read_text())['eval_loss_end']:.6f}")


if __name__ == "__main__":
    failure.run(main)
