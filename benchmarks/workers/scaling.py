"""One rank of the small model that benchmarks/scaling.py measures; rank 0 prints one JSON object last."""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.helpers.common import run_side
from benchmarks.helpers.models import NOTHING_KEPT, batch_of, engine_with
from benchmarks.helpers.wire import Wire
from sorsa_ds.config.schema import AdapterConfig, DataConfig, LoadingConfig, RunConfig, TrainConfig
from sorsa_ds.model.load import load_adapted_model
from sorsa_ds.model.sharding import Zero3
from sorsa_ds.model.sorsa_recipe import adapt_to_sorsa
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.device import this_device
from sorsa_ds.sorsa.decompose import decompose
from sorsa_ds.train.loss import summed_loss


def main() -> None:
    """Measure this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure",))
    parser.add_argument("--folder", type=Path, required=True, help="of the model")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--inside", type=int, required=True, help="1: frozen tensors are sharded inside nodes")
    parser.add_argument("--steps", type=int, required=True, help="steps that are timed")
    run_side(measure, parser.parse_args())


def small_job(nodes: int, gpus: int, inside: bool) -> Job:
    """The planner's job: ZeRO-3 in fp32 with nothing kept gathered, two micro-batches per step.

    gpus: ranks per node. inside: frozen tensors are sharded inside nodes only.
    """
    zero = {"stage": 3, **NOTHING_KEPT}
    if inside:
        zero["zero_hpz_partition_size"] = "auto"
    config = RunConfig(
        adapter=AdapterConfig(rank=16), data=DataConfig(max_length=256),
        train=TrainConfig(precision="fp32", micro_batch_size=1, gradient_accumulation_steps=2),
    )  # fmt: skip
    return Job.of(config, {"zero_optimization": zero}, Hardware(gpus=gpus, nodes=nodes))


def measure(a: argparse.Namespace) -> dict:
    """Bytes that this rank's collectives move in a step, inside its node and between nodes, and seconds of a step.

    Nodes are mere groups of ranks here.
    """
    world, device = collectives.world_size(), this_device()
    job = small_job(a.nodes, world // a.nodes, bool(a.inside))
    loaded = load_adapted_model(
        a.folder,
        lambda model: adapt_to_sorsa(
            model, job.config.adapter, job.precision, job.storage, device,
            lambda target, weight, digest=None: decompose(weight, target.rank, target.name, "randomized"),
        ),
        loading=LoadingConfig(), placement=Zero3(job.resolved.ds, device), device=device,
    )  # fmt: skip
    ds = {**job.resolved.ds, "torch_autocast": {"enabled": False}}
    engine = engine_with(loaded.model, ds)
    batch = batch_of(job.tokens, loaded.model.config.vocab_size, device)

    def step() -> None:
        engine.train_step(summed_loss(engine, batch) / job.tokens for _ in range(2))

    step()
    with Wire() as wire:
        step()
    seconds = []
    for _ in range(a.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    gpus = world // a.nodes
    received = {"inside": 0.0, "between": 0.0, "collectives": 0}
    for one in wire.seen:
        size = one.nbytes * (2 if one.kind == "allreduce_" else 1)  # as rings, as `sorsa_ds.plan.traffic` says
        n = len(one.ranks)
        leaves = n > gpus
        node = size * (a.nodes - 1) / a.nodes if leaves else 0.0
        received["between"] += node
        received["inside"] += size * (n - 1) / n - node / gpus
        received["collectives"] += leaves
    return {**received, "seconds": statistics.median(seconds), "bandwidth": bandwidth()}


def bandwidth() -> float:
    """Bytes per second that a rank receives in an all-gather of 64 MB; infinite on one rank."""
    mine = torch.zeros(2**24 // collectives.world_size())
    whole, seconds = torch.empty(len(mine) * collectives.world_size()), []
    if collectives.world_size() == 1:
        return float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, mine)
        seconds.append(time.perf_counter() - began)
    return (whole.nbytes - mine.nbytes) / statistics.median(seconds)


if __name__ == "__main__":
    main()
