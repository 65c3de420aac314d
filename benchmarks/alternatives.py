"""Alternatives to what the product does, measured against it: why each was taken or not.

    python benchmarks/alternatives.py                          all parts, the default model in fp32 on two cores
    python benchmarks/alternatives.py --only layer padding     some parts
    python benchmarks/alternatives.py --tiny                   tiny sizes, to see that it runs

layer      the autograd function, torch.compile, where s goes, casts kept, one thin product for q, k and v
optimizer  AdamW fused, foreach and as a loop
logits     the output head on all positions, on those that are learned, in chunks
padding    positions that hold no token on real data, counted, and the time of packed rows
zero3      prefetch settings, two ranks
overlap    how much hiding the Gram matrices' all-reduce behind backward could save, two ranks

The sides of a part take turns in one process. The results so far are in docs/results/alternatives.md. The last line is
one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.helpers import layer_forms
from benchmarks.helpers import padding as padded_positions
from benchmarks.helpers.common import DS_CONFIGS, TINY_LLAMA, in_ranks, say
from benchmarks.helpers.sides import add_sizes, given_sizes
from benchmarks.helpers.turns import ratio
from sorsa_ds.config import deepspeed_json

WORKER, RANKS_WORKER, WORLD = "benchmarks.workers.alternatives", "benchmarks.workers.alternatives_ranks", 2
SHIPPED = "as shipped"
PREFETCH, LIVE, REUSE, PERSIST = (
    f"stage3_{key}" for key in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance",
                                "param_persistence_threshold")
)  # fmt: skip
SMALL = {LIVE: 10_000_000, REUSE: 10_000_000}
"""In proportion to the default model what the shipped 1e9 is to a model of 13 billion parameters."""

VARIANTS = [
    {"prefetch 0": {PREFETCH: 0}, "prefetch 1e7": {PREFETCH: 10_000_000}, "persist 0": {PERSIST: 0},
     "persist 1e6": {PERSIST: 1_000_000}},
    {"live 1e7": SMALL, "live 1e7, prefetch 1e6": {**SMALL, PREFETCH: 1_000_000},
     "live 1e7, prefetch 0": {**SMALL, PREFETCH: 0}, "nothing kept": {PREFETCH: 0, LIVE: 0, REUSE: 0, PERSIST: 0}},
]  # fmt: skip
"""Settings that are compared with ds_configs/zero3.json, by name; a group is in memory at one time."""


def main() -> None:
    """Measure the parts, print tables and the JSON line."""
    parts = {
        "layer": layer_forms.compare, "optimizer": optimizer, "logits": logits, "padding": padding,
        "zero3": zero3, "overlap": overlap,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="in tiny sizes; other options for sizes are ignored")
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and alpaca/ (default: the embedded data alone)")
    add_sizes(parser)
    parser.add_argument("--linear", type=int, nargs=2, default=[1024, 1024], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 512, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--examples", type=int, help="most examples per data set")
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
    """The sizes on a worker's command line. length: another one than the command has."""
    return given_sizes(a if length is None else argparse.Namespace(**{**vars(a), "length": length}))


def table(seconds: dict[str, list[float]], base: str, notes: dict[str, str] | None = None) -> dict[str, float]:
    """Print each side's median seconds, their ratio over the base's and a note; returns the ratios."""
    found = {}
    for side, taken in seconds.items():
        found[side], low, high = ratio(taken, seconds[base])
        say(f"  {side:24} {statistics.median(taken):9.4f} s {found[side]:8.3f} ({low:.3f} .. {high:.3f})  "
            f"{(notes or {}).get(side, '')}")  # fmt: skip
    return found


def optimizer(a: argparse.Namespace) -> dict:
    """AdamW's forms on the tensors of stage 0, one per parameter, and on the flat tensors of stage 2."""
    result = {}
    for stage in (0, 2):
        found = in_ranks(WORKER, 1, "optimizer", *given(a), "--stage", str(stage))
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
    """Forward and backward of the model with each form of the output head."""
    found = in_ranks(WORKER, 1, "logits", *given(a, a.head_length))
    say(f"{a.batch} sequences of {a.head_length}, half learned; ratio over the head on learned positions, peak of live "
        "tensors without the model, loss")  # fmt: skip
    notes = {side: f"{found['bytes'][side] / 2**20:.0f} MiB, {loss:.3f}" for side, loss in found["losses"].items()}
    ratios = table(found["seconds"], "learned", notes)
    say("  Liger's fused cross-entropy: Triton kernels, for GPUs only; not measured")
    return {"head": ratios, "head_bytes": found["bytes"]}


def padding(a: argparse.Namespace) -> dict:
    """Positions without a token, and the time of one step's examples, random, grouped by length and packed."""
    result = padded_positions.compare(a)
    found = in_ranks(
        WORKER, 1, "packing", *given(a), *(["--data", str(a.data)] if a.data else []), "--global_batch",
        str(a.global_batch), "--micro_batch", str(a.micro_batch),
    )  # fmt: skip
    say(f"forward and backward of {a.global_batch} examples of {found['data']}, {a.micro_batch} per micro-batch: ratio "
        "over grouped, positions, loss")  # fmt: skip
    notes = {way: f"{count} positions, {found['losses'][way]:.4f}" for way, count in found["positions"].items()}
    return result | {"packing": table(found["seconds"], "grouped", notes), "packing_positions": found["positions"]}


def zero3(a: argparse.Namespace) -> dict:
    """A step with the settings of each variant against one with ds_configs/zero3.json."""
    if not enough_devices():
        return {}
    base = deepspeed_json.read_ds_config(DS_CONFIGS / "zero3.json")["zero_optimization"]
    result, collectives = {}, {}
    for group in VARIANTS:
        variants = {SHIPPED: base} | {name: {**base, **changed} for name, changed in group.items()}
        found = in_ranks(RANKS_WORKER, WORLD, "zero3", *given(a), "--variants", json.dumps(variants))
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
    """The regulariser and its all-reduce against a step on stage 2, with flat masters, and 3, where each one is cut."""
    if not enough_devices():
        return {}
    result = {}
    for stage in (2, 3):
        found = in_ranks(RANKS_WORKER, WORLD, "overlap", *given(a), "--stage", str(stage))
        say(f"ZeRO stage {stage}, {found['ranks']} ranks: ratio over the step; {found['bytes'] / 1e6:.2f} MB summed")
        ratios = table(found["seconds"], "step")
        result |= {f"overlap_{stage}_bound": ratios["all-reduce"], f"regularizer_{stage}": ratios["regulariser"]}
    return result


def enough_devices() -> bool:
    """Whether there is a device for each rank; prints that the part is left out where there is not."""
    enough = not torch.cuda.is_available() or torch.cuda.device_count() >= WORLD
    if not enough:
        say(f"  left out: needs {WORLD} GPUs")
    return enough


if __name__ == "__main__":
    main()
