"""What benchmarks/steps.py runs in fresh processes: sides in turns, and their flops.

Rank 0 prints one JSON object last.
"""

import argparse
import gc

import torch

from benchmarks.helpers.common import run_side
from benchmarks.helpers.flops import flop_counter, product_speed
from benchmarks.helpers.hf_trainer import TrainerSteps
from benchmarks.helpers.memory import Made, held_bytes
from benchmarks.helpers.sides import Step, add_engine, add_sizes, step_of
from benchmarks.helpers.turns import in_turns
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.device import this_device


def main() -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("turns", "flops"))
    parser.add_argument("--sides", nargs="+", required=True)
    add_sizes(parser)
    add_engine(parser)
    arguments = parser.parse_args()
    run_side({"turns": turns, "flops": flops}[arguments.what], arguments)


def turns(a: argparse.Namespace) -> dict:
    """Seconds of each side's steps, and its bytes on the rank where they are most.

    The bytes are those that a side holds between steps, and those that its second step makes.
    """
    one = torch.ones(1, 1, device=this_device())
    one @ one  # so that memory that the libraries allocate is counted for no side
    sides: dict[str, Step] = {}
    memory = {}
    for name in a.sides:
        before = held_bytes()
        sides[name] = step_of(name, a)
        sides[name]()  # the first step makes the optimizer's states
        held, made = held_bytes() - before, Made()
        take(sides[name], made)
        memory[name] = max(collectives.gather_lists([(held, made.nbytes)]), key=sum)
    seconds = in_turns(sides, a.rounds)
    return {"seconds": seconds, "memory": memory, "tokens": a.batch * a.length * collectives.world_size()}


def take(step: Step, made: Made) -> None:
    """Take one step and count its memory, on the thread in which the side takes it."""
    if isinstance(step, TrainerSteps):
        step(within=made.counting())
        return
    with made.counting():
        step()


def flops(a: argparse.Namespace) -> dict:
    """Flops of each side's step, and flop/s of this device in large products of the step's dtype."""
    counted = {}
    for name in a.sides:
        step = step_of(name, a)
        with flop_counter() as counter:
            step()
        counted[name] = counter.get_total_flops()
        del step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    dtype = torch.bfloat16 if a.precision == "mixed" else torch.float32
    return {"flops": counted, "speed": product_speed(this_device(), dtype)}


if __name__ == "__main__":
    main()
