"""The parts of benchmarks/gpu_check.py that load a model; the last line is one JSON object."""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.helpers.flops import flop_counter, product_speed
from benchmarks.helpers.models import RATE, batch_of, engine_of, peak_gib, shaped_model
from benchmarks.helpers.turns import synchronise
from sorsa_ds.config.schema import AdapterConfig, DataConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.plan.beside_tensors import CONTEXT
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.runtime.device import this_device
from sorsa_ds.runtime.process import init_distributed
from sorsa_ds.train.loss import summed_loss

SIDES = {
    "sorsa": ("sorsa", "auto", False),
    "lora": ("lora", "auto", False),
    "pissa": ("pissa", "auto", False),
    "sorsa_checkpointing": ("sorsa", "auto", True),
}
"""Name of a side -> method, storage of the residual, whether blocks are recomputed."""
BYTES = 2**30


def main() -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("steps", "nf4"))
    parser.add_argument("--shape", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=6, help="steps that are timed")
    a = parser.parse_args()
    init_distributed()
    print(json.dumps({"steps": steps, "nf4": nf4}[a.what](a)))


def steps(a: argparse.Namespace) -> dict:
    """Every side, one after the other: the model is made, stepped, and freed."""
    device = this_device()
    speed = product_speed(device, torch.bfloat16) / 1e12 if device.type == "cuda" else None
    sides = {}
    for name, side_of_it in SIDES.items():
        sides[name] = tried(a, *side_of_it)
        print(f"{name}: {json.dumps(sides[name])}", file=sys.stderr, flush=True)  # if a later side takes too long
    return {"product_tflops": speed, "sides": sides}


def nf4(a: argparse.Namespace) -> dict:
    """SORSA over a residual in 4 bits, blocks recomputed: the shape may be one that fits in no other way."""
    a.rounds = min(a.rounds, 3)
    return {"sides": {"nf4_double": tried(a, "sorsa", "nf4_double", True)}}


def tried(a: argparse.Namespace, method: str, storage: str, checkpointing: bool) -> dict:
    """A side's numbers, or why it has none: that a model does not fit is a result too."""
    try:
        return side(a, method, storage, checkpointing)
    except torch.cuda.OutOfMemoryError as error:
        return {"error": f"out of memory: {error}".partition(". ")[0]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def side(a: argparse.Namespace, method: str, storage: str, checkpointing: bool) -> dict:
    """Seconds of initialisation and of a step, speed, and memory of one side in stage 0 and mixed precision."""
    device = this_device()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    synchronise()
    began = time.perf_counter()
    model = shaped_model(a.shape, method, a.rank, 0, "mixed", storage)
    synchronise()
    initialisation = time.perf_counter() - began
    initialisation_peak = peak_gib()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engine = engine_of(model, 0, "mixed", method == "sorsa", checkpointing)
    batch = batch_of(a.length, model.config.vocab_size, device, a.batch)
    learned = a.batch * (a.length - 1)

    def step() -> None:
        engine.train_step(summed_loss(engine, batch) / learned for _ in range(1))

    step()  # the optimizer's states, and the libraries' workspaces
    seconds = []
    for _ in range(a.rounds):
        synchronise()
        began = time.perf_counter()
        step()
        synchronise()
        seconds.append(time.perf_counter() - began)
    peak = peak_gib()
    with flop_counter() as counter:
        step()
    flops = counter.get_total_flops()
    median = statistics.median(seconds)
    engine.destroy()
    highest = 989.0 if gpu else None  # dense bf16 of an H100 or H200, as the maker says
    return {
        "initialisation_seconds": initialisation, "initialisation_peak_gib": initialisation_peak,
        "step_seconds": median, "all_step_seconds": seconds, "tokens_per_second": a.batch * a.length / median,
        "flops": flops, "tflops": flops / median / 1e12, "peak_tflops": highest,
        "utilisation": flops / median / (highest * 1e12) if highest else None, "peak_gib": peak,
        "planned_gib": planned(a, method, storage, checkpointing) / BYTES,
    }  # fmt: skip


def planned(a: argparse.Namespace, method: str, storage: str, checkpointing: bool) -> int:
    """Bytes of PyTorch's tensors at the peak, as launch/plan.py says before anything is loaded."""
    config = RunConfig(
        method=method, adapter=AdapterConfig(rank=a.rank), residual=ResidualConfig(storage=storage),
        data=DataConfig(max_length=a.length),
        train=TrainConfig(precision="mixed", micro_batch_size=a.batch, global_batch_size=a.batch, learning_rate=RATE,
                          gradient_checkpointing=checkpointing),
    )  # fmt: skip
    job = Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware())
    needed = memory(job, facts(a.shape, job))
    return needed.total - CONTEXT


if __name__ == "__main__":
    main()
