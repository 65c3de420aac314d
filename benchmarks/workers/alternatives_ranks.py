"""The parts of benchmarks/alternatives.py on several ranks: ZeRO-3's prefetch settings, the regulariser's seconds.

Rank 0 prints one JSON object last.
"""

import argparse
import json
from collections import Counter

import torch

from benchmarks.helpers.common import run_side
from benchmarks.helpers.sides import add_engine, add_sizes, engine_step, step_of
from benchmarks.helpers.turns import in_turns
from benchmarks.helpers.wire import Wire
from sorsa_ds.runtime import collectives


def main() -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("zero3", "overlap"))
    parser.add_argument("--variants", type=json.loads, help="for zero3: settings of zero_optimization by name, as JSON")
    add_sizes(parser)
    add_engine(parser)
    parser.set_defaults(stage=3)
    arguments = parser.parse_args()
    run_side({"zero3": zero3, "overlap": overlap}[arguments.what], arguments)


def zero3(a: argparse.Namespace) -> dict:
    """Seconds of a step with each variant's settings, and the collectives of its third step.

    The first step only records the order in which parameters are used, and the second is the first to prefetch.
    """
    counted, sides = {}, {}
    for name, zero in a.variants.items():
        sides[name] = step_of("sorsa", argparse.Namespace(**{**vars(a), "zero": zero}))
        sides[name]()
        sides[name]()
        with Wire() as wire:
            sides[name]()
        counted[name] = {
            "collectives": len(wire.seen), "mb": sum(one.nbytes for one in wire.seen) / 1e6,
            "kinds": Counter(one.kind for one in wire.seen),
        }  # fmt: skip
    return {"seconds": in_turns(sides, a.rounds), "counted": counted}


def overlap(a: argparse.Namespace) -> dict:
    """Seconds of a step, of all that the regulariser does in a step, and of its all-reduce alone."""
    engine, step = engine_step("sorsa", a)
    step()
    grams, regularizer = engine._regularizer._grams, engine._regularizer
    masters = list({id(part.fragment.master): part.fragment.master for part in grams.fragments}.values())

    def regulariser() -> None:
        regularizer.prepare()
        regularizer.add_to(masters)

    def alone() -> None:
        before = [master.grad for master in masters]
        for master, zeros in zip(masters, gradients, strict=True):
            master.grad = zeros
        regulariser()
        for master, gradient in zip(masters, before, strict=True):
            master.grad = gradient

    gradients = [torch.zeros_like(master) for master in masters]
    buffer = torch.zeros_like(grams._buffer)
    seconds = in_turns(
        {"step": step, "regulariser": alone, "all-reduce": lambda: torch.distributed.all_reduce(buffer)}, a.rounds
    )
    return {"seconds": seconds, "bytes": buffer.nbytes, "ranks": collectives.world_size()}


if __name__ == "__main__":
    main()
