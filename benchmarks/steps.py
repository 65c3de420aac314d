"""A training step against its peers: seconds, tokens a second, memory; on every ZeRO stage, and what that costs.

    python benchmarks/steps.py                                   the default model in fp32, two cores
    python benchmarks/steps.py --shape sorsa_ds/shapes/llama2_7b --rank 128 --batch 2 --length 512 --precision mixed
                                                                 one GPU: that shape, made-up weights, stage 0

`lora`, `pissa`: PEFT's layers in this trainer's engine. `trainer`: PEFT's LoRA in the HF Trainer, as users run it.
`reference`: the authors' layer and `calc_ortho`, in a plain loop. `frozen`: forward and backward of the bare model, to
its embeddings: the floor. The sides of a stage take turns in one process on the same batch, one thread a rank; peaks of
memory are those of fresh processes. The last line is one JSON object.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from common import in_ranks, say
from turns import ratio

WORKERS = Path(__file__).with_name("steps_workers.py")
ALONE = ("trainer", "reference", "frozen")
"""Sides that know no ZeRO."""


def main() -> None:
    """Measure, print tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, help="folder with a Llama's config.json (default: the default model)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step and rank")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--precision", choices=("fp32", "mixed"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3], help="0 on one rank, others on --world")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--no_memory", action="store_true", help="leave the peaks of memory out")
    a = parser.parse_args()
    common = ["--rank", a.rank, "--batch", a.batch, "--length", a.length, "--precision", a.precision,
              "--rounds", a.rounds, *(["--shape", a.shape] if a.shape else [])]  # fmt: skip
    given = [str(word) for word in common]
    result: dict = {}
    for stage in a.stages:
        result |= compare(stage, 1 if stage == 0 else a.world, ["sorsa", "lora", "pissa"], given)
        if stage == 0:
            quantised = ["nf4"] if torch.cuda.is_available() else []
            result |= compare(0, 1, ["sorsa", "lora", *quantised], [*given, "--checkpointing"], "_checkpointing")
    if 0 in a.stages and not a.no_memory:
        result |= memory(given)
    print(json.dumps(result))


def compare(stage: int, world: int, sides: list[str], given: list[str], suffix: str = "") -> dict:
    """One stage's sides in turns: a table, and the ratios of ours over each."""
    if stage == 0 and not suffix:
        sides = [*sides, *ALONE]
    found = in_ranks(WORKERS, world, "turns", *given, "--stage", str(stage), "--sides", *sides)
    seconds, ours = found["seconds"], found["seconds"]["sorsa"]
    say(f"ZeRO stage {stage}, {world} rank{'s' * (world > 1)}{suffix.replace('_', ', ')}")
    say(f"  {'':12} {'s a step':>9} {'tokens/s':>9} {'TFLOP/s':>8} {'sorsa over it (quartiles)':>28}")
    result = {}
    for side, taken in seconds.items():
        middle = statistics.median(taken)
        against, low, high = ratio(ours, taken)
        rate = f"{found['flops'][side] / middle / 1e12:8.3f}" if side in found["flops"] else " " * 8
        say(f"  {side:12} {middle:9.3f} {found['tokens'] / middle:9.1f} {rate} "
            f"{against:10.3f} ({low:.3f} .. {high:.3f})")  # fmt: skip
        if side != "sorsa":
            name = f"step_vs_{side}" if stage == 0 else f"zero{stage}_vs_{side}"
            result[name + suffix] = against
    if stage == 0 and not suffix:
        result |= {
            "tokens_per_second": found["tokens"] / statistics.median(ours),
            "step_flops": found["flops"]["sorsa"],
        }
    return result


def memory(given: list[str]) -> dict:
    """Peaks of fresh processes that take two steps."""
    peaks = {}
    for side in ("sorsa", "lora", "pissa", *ALONE):
        peaks[side] = in_ranks(WORKERS, 1, "memory", *given, "--sides", side)["gib"]
    say("peak memory, GiB: " + ", ".join(f"{side} {gib:.2f}" for side, gib in peaks.items()))
    return {f"memory_vs_{side}": peaks["sorsa"] / gib for side, gib in peaks.items() if side != "sorsa"}


if __name__ == "__main__":
    main()
