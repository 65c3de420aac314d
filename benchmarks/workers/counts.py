"""The steps of a real run that benchmarks/counts.py counts in; rank 0 prints one JSON object last."""

import argparse
from pathlib import Path

import torch.distributed as dist

from benchmarks.helpers.common import DS_CONFIGS, run_side
from benchmarks.helpers.cycles import cyclic_tensors
from benchmarks.helpers.host_syncs import HostSyncs
from sorsa_ds.runtime.stop_signals import StopSignals
from sorsa_ds.train.options import parse
from sorsa_ds.train.setup import assemble

STEPS, ACCUMULATED = 3, 4


def main() -> None:
    """Take the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ds_config", help="name of a file in ds_configs, without .json")
    parser.add_argument("folder", type=Path, help="with a model in `model`; the run will be in it too")
    parser.add_argument("settings", nargs="*", help="more settings of the run")
    run_side(step, parser.parse_args())


def step(a: argparse.Namespace) -> dict:
    """What a step of several micro-batches costs: host syncs, signals that are waited for, tensors in cycles."""
    words = (
        f"--ds_config={DS_CONFIGS / a.ds_config}.json", f"model={a.folder / 'model'}", f"train.steps={STEPS + 1}",
        "adapter.rank=4", "train.precision=mixed", "train.micro_batch_size=2", "data.max_length=160",
        "data.eval_size=2",
        f"train.gradient_accumulation_steps={ACCUMULATED}", f"output.folder={a.folder}", f"output.name={a.ds_config}",
        *a.settings,
    )  # fmt: skip
    trainer = assemble(parse(words))
    trainer.prepare()
    for number in range(STEPS - 1):
        trainer.step(number)
    with HostSyncs() as waited, BlockingSignals() as signals:
        trainer.step(STEPS - 1)
    return {
        "host_syncs": waited.total,
        "by": dict(waited.counts),
        "blocking_signals": signals.count,
        "cyclic_tensors": cyclic_tensors(lambda: trainer.step(STEPS)),
    }


class BlockingSignals:
    """Context that counts the collectives which `StopSignals.check` begins and waits for at once."""

    def __init__(self) -> None:
        self.count = 0
        self._check, self._all_reduce = StopSignals.check, dist.all_reduce

    def __enter__(self) -> "BlockingSignals":
        def counting(*args, **kwargs):
            work = self._all_reduce(*args, **kwargs)
            self.count += work is None  # what a collective returns that was waited for
            return work

        def check(signals: StopSignals) -> None:
            dist.all_reduce = counting
            try:
                self._check(signals)
            finally:
                dist.all_reduce = self._all_reduce

        StopSignals.check = check  # type: ignore[method-assign]
        return self

    def __exit__(self, *_) -> None:
        StopSignals.check = self._check  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
