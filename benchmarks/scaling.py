"""ZeRO-3 on many nodes: the planner's bytes and seconds against a small model here, and its curve for 70B.

    python benchmarks/scaling.py        measures on 1, 2 and 4 CPU ranks, predicts, and draws docs/results/scaling.png

Bytes are counted at the collectives (`wire`). Seconds are medians, and those of a machine whose ranks share its cores.
The prediction is the planner's own (`sorsa_ds.plan`). The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from common import in_ranks, run_side, say
from transformers import LlamaConfig, LlamaForCausalLM
from wire import Wire

from sorsa_ds.config import command_line, deepspeed_json
from sorsa_ds.config.schema import DataConfig, LoadingConfig, RunConfig, SorsaConfig, TrainConfig
from sorsa_ds.engine.engine import SorsaEngine, adamw, cosine_with_warmup
from sorsa_ds.model.load import load
from sorsa_ds.model.sharding import Zero3
from sorsa_ds.plan.job import GIB, Hardware, Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import Facts, facts
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.plan.speed import flops, speed
from sorsa_ds.plan.traffic import traffic
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.process import this_device
from sorsa_ds.sorsa.decompose import decompose
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.train.loss import summed_loss

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "results" / "scaling.png"
LAYOUTS = [(1, 1, False), (1, 2, False), (2, 1, True), (1, 4, False), (2, 2, False), (2, 2, True)]
"""Measured: nodes, ranks of each, whether frozen tensors are cut inside nodes, which are mere groups of ranks here."""

RECIPE, SEQUENCES, NODES = "llama3_70b_2nodes", 1024, [1, 2, 4, 8, 16, 32, 64, 128]
LINKS = {320: "eight 400 Gb/s cards a node", 40: "one 400 Gb/s card", 10: "100 Gb/s Ethernet"}
"""GB/s that a node receives, at 80 % of the cards'."""


def main() -> None:
    """Measure, predict, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", choices=["measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    arguments = parser.parse_args()
    if arguments.side:
        run_side(measure, arguments)
    result = {"measured": measured(arguments.steps), "predicted": predicted()}
    draw(result["predicted"])
    print(json.dumps(result))


def small_job(nodes: int, gpus: int, inside: bool, **hardware: float) -> Job:
    """ZeRO-3 in fp32 with nothing kept gathered, two micro-batches a step."""
    zero = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}  # fmt: skip
    if inside:
        zero["zero_hpz_partition_size"] = "auto"
    config = RunConfig(
        sorsa=SorsaConfig(rank=16), data=DataConfig(max_length=256),
        train=TrainConfig(precision="fp32", micro_batch_size=1, gradient_accumulation_steps=2),
    )  # fmt: skip
    return Job.of(config, {"zero_optimization": zero}, Hardware(gpus=gpus, nodes=nodes, **hardware))


def measure(a: argparse.Namespace) -> dict:
    """One rank: what its collectives move in a step, by whether they leave the node, and seconds of a step."""
    world, device = collectives.world_size(), this_device()
    job = small_job(a.nodes, world // a.nodes, bool(a.inside))
    loaded = load(
        a.folder, loading=LoadingConfig(), sorsa=job.config.sorsa, precision=job.precision,
        placement=Zero3(job.resolved.ds, device), device=device, storage=job.storage,
        factor_source=lambda target, weight: decompose(weight, target.rank, target.name, "randomized"),
    )  # fmt: skip
    ds = {**job.resolved.ds, "torch_autocast": {"enabled": False}}
    engine = SorsaEngine(
        loaded.model, ds, adamw(1e-4, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(100, 0),
        Regularizer("norm", "mean", 0.2), {},
    )  # fmt: skip
    ids = torch.randint(0, 512, (1, job.tokens), generator=torch.Generator().manual_seed(collectives.rank()))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

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
    """Bytes a second that a rank receives in an all-gather of 64 MB."""
    mine = torch.zeros(2**24 // collectives.world_size())
    whole, seconds = torch.empty(len(mine) * collectives.world_size()), []
    if collectives.world_size() == 1:
        return float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, mine)
        seconds.append(time.perf_counter() - began)
    return (whole.nbytes - mine.nbytes) / statistics.median(seconds)


def measured(steps: int) -> list[dict]:
    """The planner against every layout: bytes a step, and seconds from the speed of one rank and of the loopback."""
    rows, cores, rate = [], psutil.cpu_count(logical=False) or 1, 0.0
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        shape = LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=512,
            num_key_value_heads=8, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(shape).save_pretrained(folder)
        for nodes, gpus, inside in LAYOUTS:
            found = in_ranks(
                Path(__file__), nodes * gpus, "measure", "--folder", folder, "--nodes", str(nodes),
                "--inside", str(int(inside)), "--steps", str(steps),
            )  # fmt: skip
            job = small_job(nodes, gpus, inside)
            model = facts(Path(folder), job)
            planned, needed = traffic(job, model), flops(job, model)
            rate = rate or needed / found["seconds"]
            wire = (sum(planned.inside.values()) + sum(planned.between.values()) / gpus) / found["bandwidth"]
            rows.append({
                "nodes": nodes, "ranks": nodes * gpus, "cut": "inside" if inside else "all",
                "inside_mb": found["inside"] / 1e6, "planned_inside_mb": sum(planned.inside.values()) / 1e6,
                "between_mb": found["between"] / 1e6, "planned_between_mb": sum(planned.between.values()) / 1e6,
                "collectives_between": found["collectives"] if nodes > 1 else 0, "seconds": found["seconds"],
                "planned_seconds": needed / rate * max(1, job.ranks / cores) + wire,
            })  # fmt: skip
            say(" | ".join(f"{key} {value if isinstance(value, str) else f'{value:.4g}'}"
                           for key, value in rows[-1].items()))  # fmt: skip
    return rows


def predicted() -> list[dict]:
    """Llama 3 70B, r = 128, a global batch of 1,024 sequences of 512 tokens, from 8 to 1,024 H100."""
    return [row for storage in ("bf16", "nf4") for inside in (False, True) for row in _curve(storage, inside)]


def _curve(storage: str, inside: bool) -> Iterator[dict]:
    config = command_line.load_settings(RunConfig, ROOT / "launch" / "recipes" / f"{RECIPE}.yaml")
    given = deepspeed_json.read_ds_config(ROOT / "ds_configs" / "zero3_multinode.json")
    if not inside:
        given["zero_optimization"].pop("zero_hpz_partition_size")
    models: dict[int, Facts] = {}  # by micro-batch; they do not depend on the hardware
    for nodes in NODES:
        micro = min(8, SEQUENCES // (8 * nodes))
        train = replace(config.train, global_batch_size=SEQUENCES, micro_batch_size=micro)
        settings = replace(config, train=train, residual=replace(config.residual, storage=storage))
        job = Job.of(settings, given, Hardware(gpus=8, nodes=nodes))
        if micro not in models:
            models[micro] = facts(shipped(config.model), job)
        model = models[micro]
        needed, moved = memory(job, model), traffic(job, model)
        row = {
            "storage": storage, "cut": "inside" if inside else "all", "gpus": job.ranks, "gib": needed.total / GIB,
            "frozen_gib": sum(needed.gpu[name] for name in ("residual", "frozen", "secondary")) / GIB,
            "inside_gb": sum(moved.inside.values()) / 1e9, "between_gb": sum(moved.between.values()) / 1e9,
        }  # fmt: skip
        for link in LINKS:
            there = replace(job, hardware=replace(job.hardware, node_bandwidth=float(link)))
            expected = speed(there, model, moved)
            row["compute_s"], row["dense_s"], row["inside_s"] = expected.compute, expected.dense, expected.inside
            row[f"tokens_per_second_{link}"] = expected.tokens_per_second
        say(" | ".join(f"{key} {value if isinstance(value, str) else f'{value:,.4g}'}" for key, value in row.items()))
        yield row


def draw(rows: list[dict]) -> None:
    """Tokens a second of each GPU against GPUs, a panel a link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(LINKS), figsize=(12, 3.6), layout="constrained", sharey=True)
    looks = {("bf16", "all"): ("C0", "--"), ("bf16", "inside"): ("C0", "-"), ("nf4", "all"): ("C1", "--"),
             ("nf4", "inside"): ("C1", "-")}  # fmt: skip
    for ax, (link, what) in zip(axes, LINKS.items(), strict=True):
        for (storage, cut), (colour, line) in looks.items():
            points = [row for row in rows if (row["storage"], row["cut"]) == (storage, cut)]
            ax.plot(
                [row["gpus"] for row in points], [row[f"tokens_per_second_{link}"] / row["gpus"] for row in points],
                color=colour, linestyle=line, marker=".",
                label=f"{storage}, cut {'inside nodes' if cut == 'inside' else 'over all GPUs'}",
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set(title=f"{what} ({link} GB/s)", xlabel="GPUs (8 a node)", xticks=[8 * nodes for nodes in NODES])
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="predicted tokens/s of each GPU", ylim=(0, None))
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(FIGURE, dpi=130)


if __name__ == "__main__":
    main()
