"""A training step against its peers: seconds, tokens per second, utilisation and memory, on every ZeRO stage.

    python benchmarks/steps.py                                   the default model in fp32, two cores
    python benchmarks/steps.py --shape sorsa_ds/plan/shapes/llama2_7b --rank 128 --batch 2 --length 512 \\
        --precision mixed --together 2 --world 1                 one GPU: that shape with random weights

benchmarks/helpers/sides.py lists the sides. They take turns in one process on the same batch, with one thread per rank;
--together limits how many are in memory at one time, each time ours and some of its peers. The tables give:

mfu     model flops utilisation: the flops that a step needs, per second, over those that the device reaches in large
        products of the step's dtype. A step needs what LoRA's products take (for `frozen`: the bare model's); whatever
        a side or checkpointing computes beyond that counts as no use.
memory  what a side holds between steps, and what a step makes beside that, on the rank that has most. Held tensors that
        a step frees are still counted.

The last line is one JSON object: ratios, and under `steps` everything that was measured.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass

import torch

from benchmarks.helpers.common import in_ranks, say
from benchmarks.helpers.models import NOTHING_KEPT
from benchmarks.helpers.sides import add_sizes, at_least_one, given_sizes
from benchmarks.helpers.turns import ratio

WORKER = "benchmarks.workers.steps"
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """Sides that are compared with one another, ours first.

    name: heading of the table. key: ending of the ratios' names. zero: settings of `zero_optimization`.
    """

    name: str
    stage: int
    sides: tuple[str, ...]
    key: str = ""
    checkpointing: bool = False
    zero: dict | None = None


LORA = ("sorsa", "lora", "pissa")
ROWS = [
    Row("stage 0", 0, (*LORA, "trainer_lora", "trainer_pissa", "reference", "frozen")),
    Row("stage 0, checkpointing", 0, LORA, "_checkpointing", checkpointing=True),
    Row("stage 0, 4 bits", 0, ("nf4", "sorsa", "qlora"), "_nf4"),
    Row("stage 2", 2, LORA),
    Row("stage 2, checkpointing", 2, LORA, "_checkpointing", checkpointing=True),
    Row("stage 3", 3, LORA),
    Row("stage 3, checkpointing", 3, LORA, "_checkpointing", checkpointing=True),
    Row("stage 3, 4 bits", 3, ("nf4", "sorsa"), "_nf4"),
    Row("stage 3, nothing kept", 3, LORA, "_nothing_kept", zero=NOTHING_KEPT),
]


def main() -> None:
    """Measure, print tables and the JSON line; exit code 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 2, 3], choices=(0, 2, 3), help="ZeRO stages; stage 0 on one rank"
    )
    parser.add_argument(
        "--world", type=at_least_one, default=min(2, torch.cuda.device_count() or 2), help="ranks of stages 2 and 3"
    )
    parser.add_argument(
        "--together", type=int, default=len(ROWS[0].sides), help="sides in memory at one time (default: all)"
    )
    a = parser.parse_args()
    if a.together < 2:
        parser.error("--together must be at least 2: ours and a peer")
    if torch.cuda.is_available() and set(a.stages) - {0} and torch.cuda.device_count() < a.world:
        parser.error(f"--world {a.world}: there are {torch.cuda.device_count()} GPUs")
    counted = in_ranks(WORKER, 1, "flops", *given_sizes(a), "--sides", "sorsa", "lora", "reference", "frozen")
    say("GFLOP per step: " + ", ".join(f"{side} {flops / 1e9:.1f}" for side, flops in counted["flops"].items())
        + f"; GFLOP/s in large products: {counted['speed'] / 1e9:.1f}")  # fmt: skip
    result: dict = {"steps": {"sizes": {**vars(a), "shape": a.shape and a.shape.name}, **counted, "rows": {}}}
    failed: list[str] = []
    for row in (row for row in ROWS if row.stage in a.stages):
        table = measure(row, a, counted, failed)
        result["steps"]["rows"][row.name] = {"world": world_of(row, a), "sides": table}
        result |= summary(row, world_of(row, a), table)
    result["steps"]["failed"] = failed
    print(json.dumps(result))
    sys.exit(1 if failed else 0)


def world_of(row: Row, a: argparse.Namespace) -> int:
    """The number of ranks of a row."""
    return 1 if row.stage == 0 else a.world


def measure(row: Row, a: argparse.Namespace, counted: dict, failed: list[str]) -> dict[str, dict]:
    """Measure and print a row's table: by side its seconds and bytes, and what follows from them.

    Sides that were measured together and of which one failed are left out, and named in `failed`.
    """
    world = world_of(row, a)
    words = [*given_sizes(a), "--stage", str(row.stage)]
    words += ["--checkpointing"] if row.checkpointing else []
    words += ["--zero", json.dumps(row.zero)] if row.zero else []
    ours, *peers = row.sides
    say(f"\n{row.name}: {world} rank{'s' * (world > 1)}\n  {'':14} {'s / step':>8} {'tokens/s':>9} {'mfu':>6} "
        f"{'MiB held':>9} {'made':>8}   {ours} over it (quartiles)")  # fmt: skip
    if "qlora" in peers and a.shape is not None:
        peers.remove("qlora")
        say("  qlora is left out: there is one of the default model only")
    table: dict[str, dict] = {}
    for start in range(0, len(peers), a.together - 1):
        group = (ours, *peers[start : start + a.together - 1])
        try:
            found = in_ranks(WORKER, world, "turns", *words, "--sides", *group)
        except RuntimeError as error:
            say(f"  {error}")
            failed.append(f"{row.name}: {', '.join(group)}")
            continue
        for side in group if not table else group[1:]:
            seconds = found["seconds"][side]
            middle = statistics.median(seconds)
            held, made = found["memory"][side]
            needed = counted["flops"]["frozen" if side == "frozen" else "lora"]
            table[side] = {
                "seconds": seconds, "tokens_per_second": found["tokens"] / middle,
                "mfu": needed / middle / counted["speed"], "held_bytes": held, "made_bytes": made,
            }  # fmt: skip
            if side != ours:
                beside = found["seconds"][ours]
                over_it = dict(zip(("median", "low", "high"), ratio(beside, seconds), strict=True))
                table[side] |= {"ours_seconds": beside, "ours_over_it": over_it}
            say(line(side, table[side], middle))
    return table


def line(side: str, found: dict, seconds: float) -> str:
    """The line of one side in the table."""
    against = (
        "{median:.3f} ({low:.3f} .. {high:.3f})".format(**found["ours_over_it"]) if "ours_over_it" in found else ""
    )
    return (
        f"  {side:14} {seconds:8.3f} {found['tokens_per_second']:9.1f} {found['mfu']:6.1%} "
        f"{found['held_bytes'] / MIB:9.1f} {found['made_bytes'] / MIB:8.1f}   {against}"
    )


def summary(row: Row, world: int, table: dict[str, dict]) -> dict[str, float]:
    """Ratios of ours to its peers, and its own figures, by name; nothing of an empty table.

    The names of ZeRO stages on one rank end in `_1_rank`.
    """
    if not table:
        return {}
    ours = next(iter(table))
    step, memory = ("step", "memory") if row.stage == 0 else (f"zero{row.stage}", f"zero{row.stage}_memory")
    key = row.key if row.stage == 0 or world > 1 else f"{row.key}_1_rank"
    named = {f"{step}_mfu{key}": table[ours]["mfu"], f"{step}_tokens_per_second{key}": table[ours]["tokens_per_second"]}
    for side, found in table.items():
        if side != ours:
            named[f"{step}_vs_{side}{key}"] = found["ours_over_it"]["median"]
            named[f"{memory}_vs_{side}{key}"] = peak(table[ours]) / peak(found)
    return named


def peak(found: dict) -> int:
    """The most bytes that a side has at one time."""
    return found["held_bytes"] + found["made_bytes"]


if __name__ == "__main__":
    main()
