"""Workers of benchmarks/steps.py: sides in turns, and their flops; rank 0 prints one JSON object last."""

import argparse
import gc
import json

import torch

from benchmarks.helpers.common import run_side
from benchmarks.helpers.flops import flop_counter, product_speed
from benchmarks.helpers.hf_trainer import TrainerSteps
from benchmarks.helpers.memory import Made, held_bytes
from benchmarks.helpers.sides import Step, add_sizes, step_of
from benchmarks.helpers.turns import in_turns
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.process import this_device


def main() -> None:
    """Run the worker that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("turns", "flops"))
    parser.add_argument("--sides", nargs="+", required=True)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--zero", type=json.loads, help="settings of zero_optimization beside the shipped ones, JSON")
    parser.add_argument("--checkpointing", action="store_true")
    add_sizes(parser)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    run_side({"turns": turns, "flops": flops}[arguments.what], arguments)


def turns(a: argparse.Namespace) -> dict:
    """Seconds of each side's step, a list a side; bytes that it holds between steps and that its second step makes, on
    the rank where they are most."""
    one = torch.ones(1, 1, device=this_device())
    one @ one  # the libraries' own memory is nobody's
    sides: dict[str, Step] = {}
    memory = {}
    for name in a.sides:
        before = held_bytes()
        sides[name] = step_of(name, a)
        sides[name]()  # the optimizer's states
        held, made = held_bytes() - before, Made()
        take(sides[name], made)
        memory[name] = max(collectives.gather_lists([(held, made.nbytes)]), key=sum)
    seconds = in_turns(sides, a.rounds)
    return {"seconds": seconds, "memory": memory, "tokens": a.batch * a.length * collectives.world_size()}


def take(step: Step, made: Made) -> None:
    """One step whose memory is counted, on the thread on which the side takes it."""
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
