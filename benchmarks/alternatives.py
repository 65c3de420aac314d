"""What else was thought of, measured against what the product does: kept or dropped, with figures.

    python benchmarks/alternatives.py                          all parts, the default model in fp32 on two cores
    python benchmarks/alternatives.py --only layer padding     some parts
    python benchmarks/alternatives.py --tiny                   tiny sizes: whether it runs, not how fast

layer      the autograd function, torch.compile, where s goes, casts kept, one thin product for q, k and v
optimizer  AdamW fused, foreach and as a loop
logits     the output head everywhere, where something is learned, in chunks
padding    positions computed for nothing on real data, counted, and the time of packed rows
zero3      prefetch settings, two ranks
overlap    what hiding the Gram matrices' all-reduce behind backward could save, two ranks

The sides of a part take turns in one process. The results so far are in docs/results/alternatives.md. The last line is
one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import alternatives_layer
import alternatives_padding
import torch
from common import in_ranks, say
from run import TINY_LLAMA
from sides import add_sizes, given_sizes
from turns import ratio

from sorsa_ds.config import deepspeed_json

FOLDER = Path(__file__).parent
WORKERS, RANKS, WORLD = FOLDER / "alternatives_workers.py", FOLDER / "alternatives_ranks.py", 2
SHIPPED = "as shipped"
PREFETCH, LIVE, REUSE, PERSIST = (
    f"stage3_{key}" for key in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance",
                                "param_persistence_threshold")
)  # fmt: skip
SMALL = {LIVE: 10_000_000, REUSE: 10_000_000}
"""Of the default model what the shipped 1e9 are of a model of 13 billion."""

VARIANTS = [
    {"prefetch 0": {PREFETCH: 0}, "prefetch 1e7": {PREFETCH: 10_000_000}, "persist 0": {PERSIST: 0},
     "persist 1e6": {PERSIST: 1_000_000}},
    {"live 1e7": SMALL, "live 1e7, prefetch 1e6": {**SMALL, PREFETCH: 1_000_000},
     "live 1e7, prefetch 0": {**SMALL, PREFETCH: 0}, "nothing kept": {PREFETCH: 0, LIVE: 0, REUSE: 0, PERSIST: 0}},
]  # fmt: skip
"""Against ds_configs/zero3.json; a list is what is in memory together."""


def main() -> None:
    """Measure the parts, print tables and the JSON line."""
    parts = {
        "layer": alternatives_layer.compare, "optimizer": optimizer, "logits": logits, "padding": padding,
        "zero3": zero3, "overlap": overlap,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="in tiny sizes; what else is said about sizes is ignored")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with gsm8k/ and alpaca/")
    add_sizes(parser)
    parser.add_argument("--linear", type=int, nargs=2, default=[1024, 1024], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 512, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--examples", type=int, help="of each data set at most")
    parser.set_defaults(global_batch=8, micro_batch=2)
    a = parser.parse_args()
    a.head_length = 2 * a.length
    with tempfile.TemporaryDirectory() as folder:
        if a.tiny:
            (Path(folder) / "config.json").write_text(json.dumps(TINY_LLAMA))
            tiny = {"shape": Path(folder), "linear": [64, 48], "tokens": [32], "ranks": [4], "rank": 4, "length": 16,
                    "head_length": 32, "rounds": 2, "examples": 256}  # fmt: skip
            vars(a).update(tiny)
        result = {}
        for name in parts:
            if name in a.only:
                say(f"\n## {name}")
                result |= {f"alternatives_{key}": value for key, value in parts[name](a).items()}
    print(json.dumps(result))


def given(a: argparse.Namespace, length: int | None = None) -> list[str]:
    """What every worker is told."""
    sizes = given_sizes(a if length is None else argparse.Namespace(**{**vars(a), "length": length}))
    return [*sizes, "--rounds", str(a.rounds)]


def table(seconds: dict[str, list[float]], base: str, notes: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds of each side and their ratio over the base's; the ratios."""
    found = {}
    for side, taken in seconds.items():
        found[side], low, high = ratio(taken, seconds[base])
        say(f"  {side:24} {statistics.median(taken):9.4f} s {found[side]:8.3f} ({low:.3f} .. {high:.3f})  "
            f"{(notes or {}).get(side, '')}")  # fmt: skip
    return found


def optimizer(a: argparse.Namespace) -> dict:
    """On tensors as stage 0 has them, a parameter each, and as ZeRO has them, flat."""
    result = {}
    for stage in (0, 2):
        found = in_ranks(WORKERS, 1, "optimizer", *given(a), "--stage", str(stage))
        say(f"AdamW on stage {stage}: {found['tensors']} tensors, {found['numbers'] / 1e6:.2f} M numbers; ratio over "
            "fused (quartiles), largest gap to the loop")  # fmt: skip
        gaps = {form: f"{gap:.1e}" for form, gap in found["gaps"].items()}
        ratios = table(found["seconds"], "fused", gaps)
        share = 1 / ratios["step"]
        say(f"  fused: {share:.2%} of a step")
        result |= {f"adamw_{stage}_{form}": ratios[form] for form in ("foreach", "loop")}
        result[f"adamw_{stage}_share"] = share
    return result


def logits(a: argparse.Namespace) -> dict:
    """Forward and backward of the model with each head. Liger's kernel needs a GPU."""
    found = in_ranks(WORKERS, 1, "logits", *given(a, a.head_length))
    say(f"{a.batch} sequences of {a.head_length}, half learned; ratio over the head on learned positions, peak of live "
        "tensors without the model, loss")  # fmt: skip
    notes = {side: f"{found['bytes'][side] / 2**20:.0f} MiB, {loss:.3f}" for side, loss in found["losses"].items()}
    ratios = table(found["seconds"], "learned", notes)
    say("  Liger's fused cross-entropy: Triton kernels, for GPUs only; not measured")
    return {"head": ratios, "head_bytes": found["bytes"]}


def padding(a: argparse.Namespace) -> dict:
    """The counts, and the time of the first step's examples in each way."""
    result = alternatives_padding.compare(a)
    found = in_ranks(
        WORKERS, 1, "packing", *given(a), "--data", str(a.data), "--global_batch", str(a.global_batch),
        "--micro_batch", str(a.micro_batch),
    )  # fmt: skip
    say(f"forward and backward of {a.global_batch} examples of {found['data']}, {a.micro_batch} a micro-batch: ratio "
        "over grouped, positions, loss")  # fmt: skip
    notes = {way: f"{count} positions, {found['losses'][way]:.4f}" for way, count in found["positions"].items()}
    return result | {"packing": table(found["seconds"], "grouped", notes), "packing_positions": found["positions"]}


def zero3(a: argparse.Namespace) -> dict:
    """Each variant against ds_configs/zero3.json."""
    if not enough_devices():
        return {}
    base = deepspeed_json.read_ds_config(FOLDER.parent / "ds_configs" / "zero3.json")["zero_optimization"]
    result, collectives = {}, {}
    for group in VARIANTS:
        variants = {SHIPPED: base} | {name: {**base, **changed} for name, changed in group.items()}
        found = in_ranks(RANKS, WORLD, "zero3", *given(a), "--variants", json.dumps(variants))
        say(f"ZeRO-3 on {WORLD} ranks: ratio over ds_configs/zero3.json, collectives of a step")
        notes = {
            name: f"{one['collectives']} of {one['mb']:.0f} MB: "
            + ", ".join(f"{count} {kind}" for kind, count in one["kinds"].items())
            for name, one in found["counted"].items()
        }
        result |= table(found["seconds"], SHIPPED, notes)
        collectives |= {name: one["collectives"] for name, one in found["counted"].items()}
    return {"zero3": result, "zero3_collectives": collectives}


def overlap(a: argparse.Namespace) -> dict:
    """Where masters are flat over a group (2) and where each is cut (3)."""
    if not enough_devices():
        return {}
    result = {}
    for stage in (2, 3):
        found = in_ranks(RANKS, WORLD, "overlap", *given(a), "--stage", str(stage))
        say(f"ZeRO stage {stage}, {found['ranks']} ranks: ratio over the step; {found['bytes'] / 1e6:.2f} MB summed")
        ratios = table(found["seconds"], "step")
        result |= {f"overlap_{stage}_bound": ratios["all-reduce"], f"regularizer_{stage}": ratios["regulariser"]}
    return result


def enough_devices() -> bool:
    """Whether there is a device for each rank; says so where there is not."""
    enough = not torch.cuda.is_available() or torch.cuda.device_count() >= WORLD
    if not enough:
        say(f"  left out: needs {WORLD} GPUs")
    return enough


if __name__ == "__main__":
    main()
