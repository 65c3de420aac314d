"""Where the time of a training step goes: the ten operators (on a GPU: kernels) that take most of it.

    python benchmarks/profile_step.py                                  the default model
    python benchmarks/profile_step.py --shape sorsa_ds/plan/shapes/llama2_7b --rank 128 --batch 2 --length 512 \\
        --precision mixed                                              that shape, random weights, one GPU

The last line is one JSON object.
"""

import argparse
import json

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.helpers.common import say
from benchmarks.helpers.sides import add_engine, add_sizes, step_of
from sorsa_ds.runtime.process import init_distributed


def main() -> None:
    """Profile the third step, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    add_engine(parser)
    a = parser.parse_args()
    init_distributed()
    step = step_of("sorsa", a)
    step()
    step()
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        step()
    seconds = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        seconds[event.key] = own / 1e6
    total = sum(seconds.values())
    ten = sorted(seconds.items(), key=lambda pair: -pair[1])[:10]
    say(f"{total:.3f} s in all operators of a step; the ten largest:")
    for name, own in ten:
        say(f"  {own / total:6.1%} {own:9.4f} s  {name[:90]}")
    print(json.dumps({"profile": [[name, own / total] for name, own in ten]}))


if __name__ == "__main__":
    main()
