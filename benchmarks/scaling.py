"""ZeRO-3 on many nodes: the planner's bytes and seconds against those of a small model here, and its curve for 70B.

    python benchmarks/scaling.py        measures on 1, 2 and 4 CPU ranks, predicts, and draws docs/results/scaling.png

Bytes are counted at the collectives (benchmarks/helpers/wire.py). Seconds are medians, on a machine whose ranks share
its cores. The prediction is that of `sorsa_ds.plan`. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.helpers.common import DS_CONFIGS, ROOT, in_ranks, say
from benchmarks.workers.scaling import small_job
from sorsa_ds.config import command_line, deepspeed_json
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import Facts, facts
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.plan.speed import flops, speed
from sorsa_ds.plan.traffic import traffic
from sorsa_ds.runtime.memory import GIB

FIGURE = ROOT / "docs" / "results" / "scaling.png"
LAYOUTS = [(1, 1, False), (1, 2, False), (2, 1, True), (1, 4, False), (2, 2, False), (2, 2, True)]
"""What is measured: nodes, ranks per node, whether frozen tensors are sharded inside nodes only."""

WORKER = "benchmarks.workers.scaling"
RECIPE, SEQUENCES, NODES = "llama3_70b_2nodes", 1024, [1, 2, 4, 8, 16, 32, 64, 128]
LINKS = {320: "eight 400 Gb/s cards per node", 40: "one 400 Gb/s card", 10: "100 Gb/s Ethernet"}
"""GB/s that a node receives, 80 % of what its network cards are made for."""


def main() -> None:
    """Measure, predict, draw, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    arguments = parser.parse_args()
    result = {"measured": measured(arguments.steps), "predicted": predicted()}
    draw(result["predicted"])
    print(json.dumps(result))


def measured(steps: int) -> list[dict]:
    """Bytes and seconds per step of every layout, measured and planned.

    The planned seconds follow from the measured speed of one rank and of the loopback device.
    """
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
                WORKER, nodes * gpus, "measure", "--folder", folder, "--nodes", str(nodes),
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
    """The planner's figures for Llama 3 70B, r = 128, 1,024 sequences of 512 tokens per step, on 8 to 1,024 H100."""
    return [row for storage in ("bf16", "nf4") for inside in (False, True) for row in _curve(storage, inside)]


def _curve(storage: str, inside: bool) -> Iterator[dict]:
    config = command_line.load_settings(RunConfig, ROOT / "launch" / "recipes" / f"{RECIPE}.yaml")
    given = deepspeed_json.read_ds_config(DS_CONFIGS / "zero3_multinode.json")
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
    """Draw tokens per second and GPU against the number of GPUs, with a panel per link."""
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
        ax.set(title=f"{what} ({link} GB/s)", xlabel="GPUs (8 per node)", xticks=[8 * nodes for nodes in NODES])
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="predicted tokens/s per GPU", ylim=(0, None))
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(FIGURE, dpi=130)


if __name__ == "__main__":
    main()
