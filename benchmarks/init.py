"""The distributed initialisation: speed against one rank, PEFT and the full SVD; memory against what it should need.

    python benchmarks/init.py            all parts
    python benchmarks/init.py --gib 2    size of the checkpoint that is written to measure memory

Each part runs its sides one after the other in fresh processes with one thread per rank, several times, and takes the
median. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.helpers.common import ROOT, in_ranks, say
from sorsa_ds.config.schema import SorsaConfig

DEFAULT = SorsaConfig().svd_tolerance
TOLERANCES = (DEFAULT, 2 * DEFAULT, 4 * DEFAULT)
WORKER = "benchmarks.workers.init"


def main() -> None:
    """Measure every part, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peft_ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--size", type=int, default=4096, help="side of the matrix for the full SVD")
    arguments = parser.parse_args()
    result: dict = {}
    result |= speedup(arguments.repeats)
    result |= against_peft(arguments.peft_ranks, arguments.repeats)
    result |= against_full_svd(arguments.size)
    result |= memory(arguments.gib, arguments.ranks)
    print(json.dumps(result))


def speedup(repeats: int) -> dict:
    """Seconds of one rank over those of two, with one thread each.

    `ranks2_speedup`: the decomposition (each round's slowest rank, summed) of matrices of 2048 x 2048 and 5632 x 2048
    at r = 128, sharded for ZeRO-3. `ranks2_speedup_whole`: the whole initialisation, in which every rank builds the
    skeleton and takes part in the exchange. Names with `_default`: the default model, whole on both ranks, r = 16.
    """
    result = {}
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        run(1, "write", "--folder", folder, "--gib", "0.6")
        wide = ("--folder", folder, "--rank", "128", "--method", "randomized")
        for what, side in (
            ("", wide),
            ("_default_exact", ("--method", "exact")),
            ("_default_randomized", ("--method", "randomized")),
        ):
            runs = {world: [] for world in (1, 2)}
            for _ in range(repeats):
                for world, found in runs.items():
                    found.append(run(world, "load", *side))
            for key, name in (("decomposing", "ranks2_speedup"), ("seconds", "ranks2_speedup_whole")):
                one, two = (statistics.median(found[key] for found in runs[world]) for world in (1, 2))
                result[name + what] = one / two
                say(f"{what or 'wide'}, {key}: {one:.2f} s on 1 rank, {two:.2f} s on 2, ratio {one / two:.2f}")
    return result


def against_peft(ranks: list[int], repeats: int) -> dict:
    """Whole initialisation of the default model in one process against PEFT's `pissa_niter_4`: time and accuracy.

    `vs_pissa_niter_4`: PEFT's seconds over ours at the loosest of TOLERANCES that is no less accurate than PEFT is.
    Names with `default_tolerance`: at the trainer's own tolerance.
    """
    result: dict = {
        key: {}
        for key in (
            "vs_pissa_niter_4", "vs_pissa_niter_4_default_tolerance", "pissa_niter_4_energy_excess",
            "residual_energy_excess_vs_pissa", "residual_energy_excess_default_tolerance",
        )
    }  # fmt: skip
    for rank in ranks:
        side = ("--rank", str(rank))
        excess = run(1, "excess", *side, "--tolerances", *map(str, TOLERANCES))
        peft = excess["pissa_niter_4"]
        fair = max((t for t in TOLERANCES if excess[str(t)] <= peft), default=DEFAULT)
        times: dict = {key: [] for key in ("peft", DEFAULT, fair)}
        for _ in range(repeats):
            times["peft"].append(run(1, "peft", *side)["seconds"])
            for t in {DEFAULT, fair}:
                times[t].append(run(1, "load", *side, "--tolerance", str(t))["seconds"])
        ratio = {t: statistics.median(times["peft"]) / statistics.median(times[t]) for t in (DEFAULT, fair)}
        result["vs_pissa_niter_4"][rank] = ratio[fair]
        result["vs_pissa_niter_4_default_tolerance"][rank] = ratio[DEFAULT]
        result["pissa_niter_4_energy_excess"][rank] = peft
        result["residual_energy_excess_vs_pissa"][rank] = excess[str(fair)]
        result["residual_energy_excess_default_tolerance"][rank] = excess[str(DEFAULT)]
        for t in sorted({DEFAULT, fair}):
            say(f"r = {rank}, tolerance {t}: PEFT's time / ours {ratio[t]:.2f}; worst excess residual energy: "
                f"PEFT {peft:.2%}, ours {excess[str(t)]:.2%}")  # fmt: skip
    return result


def against_full_svd(size: int) -> dict:
    """One square matrix with a real layer's spectrum, r = 128: the full SVD's time over ours."""
    found = run(1, "full", "--size", str(size), "--rank", "128")
    say(f"{size} x {size}, r = 128: full SVD {found['full']:.1f} s, ours {found['ours']:.2f} s, "
        f"excess residual energy {found['excess']:.2e}")  # fmt: skip
    return {"vs_full_svd": found["full"] / found["ours"], "residual_energy_excess": found["excess"]}


def memory(gib: float, worlds: list[int]) -> dict:
    """Peak resident memory per rank under ZeRO-3, over the rank's shard plus the stated working set.

    gib: size of the weights on disk. worlds: numbers of ranks.
    """
    result: dict = {"rss_gib": {}, "budget_gib": {}, "rss_over_budget": 0.0}
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        run(1, "write", "--folder", str(large), "--gib", str(gib), "--flat")
        run(1, "write", "--folder", str(small), "--gib", str(gib / 5), "--flat")  # exact takes long
        cases = ((large, gib, "randomized", 32), (large, gib, "randomized", 128), (small, gib / 5, "exact", 16))
        for checkpoint, size, method, rank in cases:
            for world in worlds:
                found = run(world, "memory", "--folder", str(checkpoint), "--method", method, "--rank", str(rank))
                case, ratio = f"{method} r={rank}, {world} ranks", found["rss"] / found["budget"]
                result["rss_gib"][case], result["budget_gib"][case] = found["rss"], found["budget"]
                result["rss_over_budget"] = max(result["rss_over_budget"], ratio)
                say(f"{size:.1f} GiB of weights, {case}: {found['rss']:.2f} GiB per rank above the process's start, "
                    f"shard {found['shard']:.2f}, with the working set {found['budget']:.2f}, "
                    f"ratio {ratio:.2f}")  # fmt: skip
        whole = run(1, "from_pretrained", "--folder", str(large))["rss"]
        result["from_pretrained_rss_gib"] = whole
        say(f"from_pretrained: {whole:.2f} GiB on every rank")
    return result


def run(world: int, what: str, *arguments: str) -> dict:
    """Run one side of a comparison in fresh processes."""
    return in_ranks(WORKER, world, what, *arguments)


if __name__ == "__main__":
    main()
