"""The distributed initialisation: its speed against one rank, PEFT and the full SVD; its memory against the budget.

    python benchmarks/init.py            all parts, some minutes on two cores
    python benchmarks/init.py --gib 2    size of the checkpoint that is written to measure memory

Each part runs its sides one after the other in fresh processes with one thread a rank, several times, and takes the
median. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKERS = Path(__file__).with_name("init_workers.py")


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
    """The default model, exact and randomised: one rank against two, one thread each.

    `ranks2_speedup` is that of the decomposition (the busiest rank's work); `..._whole` adds the skeleton, which every
    rank builds, and the exchange, which on a model this small costs as much as the randomised decomposition.
    """
    result = {}
    for method, suffix in (("exact", ""), ("randomized", "_randomized")):
        runs = {world: [] for world in (1, 2)}
        for _ in range(repeats):
            for world, found in runs.items():
                found.append(run(world, "load", "--method", method))
        for key, name in (("decomposing", "ranks2_speedup"), ("seconds", "ranks2_speedup_whole")):
            one, two = (statistics.median(found[key] for found in runs[world]) for world in (1, 2))
            result[name + suffix] = one / two
            say(f"{method}, {key}: {one:.2f} s on 1 rank, {two:.2f} s on 2, ratio {one / two:.2f}")
    return result


def against_peft(ranks: list[int], repeats: int) -> dict:
    """Whole initialisation of the default model in one process against PEFT's `pissa_niter_4`: time and accuracy."""
    result: dict = {"vs_pissa_niter_4": {}, "pissa_niter_4_energy_excess": {}, "residual_energy_excess_default": {}}
    for rank in ranks:
        ours = [run(1, "load", "--method", "randomized", "--rank", str(rank)) for _ in range(repeats)]
        theirs = [run(1, "peft", "--rank", str(rank)) for _ in range(repeats)]
        ratio = statistics.median(x["seconds"] for x in theirs) / statistics.median(x["seconds"] for x in ours)
        excess = run(1, "excess", "--rank", str(rank))
        result["vs_pissa_niter_4"][rank] = ratio
        result["pissa_niter_4_energy_excess"][rank] = excess["pissa_niter_4"]
        result["residual_energy_excess_default"][rank] = excess["ours"]
        say(f"r = {rank}: PEFT's time / ours {ratio:.2f}; worst excess residual energy: "
            f"PEFT {excess['pissa_niter_4']:.2%}, ours {excess['ours']:.2%}")  # fmt: skip
    return result


def against_full_svd(size: int) -> dict:
    """One square matrix with a real layer's spectrum, r = 128: the full SVD's time over ours."""
    found = run(1, "full", "--size", str(size), "--rank", "128")
    say(f"{size} x {size}, r = 128: full SVD {found['full']:.1f} s, ours {found['ours']:.2f} s, "
        f"excess residual energy {found['excess']:.2e}")  # fmt: skip
    return {"vs_full_svd": found["full"] / found["ours"], "residual_energy_excess": found["excess"]}


def memory(gib: float, worlds: list[int]) -> dict:
    """Peak resident memory a rank on a checkpoint of `gib`, ZeRO-3, over (final shard + stated working set)."""
    result: dict = {"rss_gib": {}, "budget_gib": {}}
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        run(1, "write", "--folder", folder, "--gib", str(gib))
        for world in worlds:
            found = run(world, "memory", "--folder", folder)
            result["rss_gib"][world], result["budget_gib"][world] = found["rss"], found["budget"]
            result["rss_over_budget"] = found["rss"] / found["budget"]
            say(f"{gib} GiB checkpoint, {world} ranks: {found['rss']:.2f} GiB a rank above the process's start, "
                f"budget {found['budget']:.2f}, ratio {result['rss_over_budget']:.2f}")  # fmt: skip
        whole = run(1, "from_pretrained", "--folder", folder)["rss"]
        result["from_pretrained_rss_gib"] = whole
        say(f"from_pretrained: {whole:.2f} GiB on every rank")
    return result


def run(world: int, what: str, *arguments: str) -> dict:
    """One side of a comparison in fresh processes; the JSON that rank 0 prints last."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, str(WORKERS), what, *arguments], env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
