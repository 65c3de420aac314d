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
from benchmarks.helpers.turns import synchronise
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
        synchronise()
    events = profiler.key_averages()
    if gpu:  # operators and annotations carry the time of their kernels too
        on_gpu = torch.autograd.DeviceType.CUDA
        kernels = [e for e in events if e.device_type == on_gpu and not e.is_user_annotation]
        seconds = {event.key: event.self_device_time_total / 1e6 for event in kernels}
    else:
        seconds = {event.key: event.self_cpu_time_total / 1e6 for event in events}
    launches = sum(event.count for event in events if event.key in ("cudaLaunchKernel", "cudaLaunchKernelExC"))
    total = sum(seconds.values())
    ten = sorted(seconds.items(), key=lambda pair: -pair[1])[:10]
    say(f"{total:.3f} s in all operators of a step; the ten largest:")
    for name, own in ten:
        say(f"  {own / total:6.1%} {own:9.4f} s  {name[:90]}")
    shares = [[name, own / total] for name, own in ten]
    print(json.dumps({"profile": shares, "profiled_seconds": total, "launches": launches if gpu else None}))


if __name__ == "__main__":
    main()
