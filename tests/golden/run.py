"""Golden numbers: short runs whose every loss, norm and factor must stay the same to the last bit.

    python tests/golden/run.py            compare with golden.json, exit with 1 where a number differs
    python tests/golden/run.py --write    write golden.json anew, after a change that is meant to move numbers

A refactoring must not move one bit; a change of the maths shows here as a difference that has to be explained. The
program starts itself anew with the libraries' processor-specific kernels turned off, so that the same numbers come out
on every x86-64 machine, and it compares numbers of the same torch version only.

The file has been written anew since: factors that are orthonormal to rounding no longer get a gradient of the
regulariser: the norm added in step 0 is 0 where it was 3.78, and all later numbers follow; the layer computes with two
thin matrices, one of which holds s: numbers moved by 1e-7 of themselves.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden.json"
ROOT = HERE.parents[1]
STEPS = 5
RUNS = {
    "stage0-1rank": (1, "stage0", ()),
    "zero2-1rank": (1, "zero2", ()),
    "zero3-1rank": (1, "zero3", ()),
    "stage0-2ranks": (2, "stage0", ()),
    "zero2-2ranks": (2, "zero2", ()),
    "zero3-2ranks": (2, "zero3", ()),
    "stage0-1rank-nf4": (1, "stage0", ("residual.storage=nf4",)),
    "zero3-2ranks-nf4": (2, "zero3", ("residual.storage=nf4",)),
}
"""Name of a run -> ranks, DeepSpeed JSON, further settings."""
SAME_EVERYWHERE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
}
"""Environment under which ATen, MKL and oneDNN take the same path on every x86-64 processor."""
LOGGED = ("loss", "grad_norm", "reg_loss", "reg_grad_norm", "learning_rate", "eval_loss")


def settings(folder: Path, name: str, more: tuple[str, ...]) -> list[str]:
    """The settings of one run on the model and the rows that lie beside this file."""
    return [
        f"model={HERE / 'model'}", f"data.path={HERE / 'rows.jsonl'}", "data.eval_size=4", f"train.steps={STEPS}",
        "adapter.rank=4", "sorsa.svd=exact", "train.global_batch_size=4", "train.micro_batch_size=1",
        "train.precision=fp32", "train.learning_rate=1e-3", "train.max_start_gap=9", "regularizer.gamma=0.01",
        f"output.folder={folder}", f"output.name={name}", "output.save_every=0",
        "output.peft_adapter=false", *more,
    ]  # fmt: skip


def rank_of_run(arguments: list[str]) -> None:
    """One rank's part of a run."""
    from sorsa_ds.train.options import parse
    from sorsa_ds.train.setup import assemble

    assemble(parse(arguments)).train()


def numbers_of(run: Path) -> dict:
    """Every logged number of a finished run, and the digest of what it trained.

    Floats are kept as Python writes them, which is exact.
    """
    from safetensors.torch import load_file
    from xxhash import xxh3_128_hexdigest

    from sorsa_ds.model.adapter_file import TRAINED

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key: [line[key] for line in lines if key in line] for key in LOGGED}
    factors = load_file(run / "adapter" / TRAINED)
    whole = b"".join(name.encode() + factors[name].numpy().tobytes() for name in sorted(factors))
    return {**logged, "factors": xxh3_128_hexdigest(whole)}


def measure() -> dict[str, dict]:
    """Make all runs, each in forked ranks; name of the run -> its numbers."""
    sys.path.insert(0, str(ROOT))
    import sorsa_ds.train.setup  # noqa: F401  once here, not in each of the forked ranks
    from tests.helpers.worlds import run_ranks

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SORSA_CACHE"] = f"{folder}/cache"
        for name, (ranks, ds, more) in RUNS.items():
            arguments = [*settings(Path(folder), name, more), f"--ds_config={ROOT}/ds_configs/{ds}.json"]
            run_ranks(ranks, rank_of_run, arguments)
            found[name] = numbers_of(Path(folder) / name)
    return found


def differences(found: dict[str, dict], golden: dict[str, dict]) -> list[str]:
    """Every number that is not as it was, in words."""
    told = []
    for name in sorted({*found, *golden}):
        ours, theirs = found.get(name, {}), golden.get(name, {})
        told += [
            f"{name}: {key} is {ours.get(key)}, golden is {theirs.get(key)}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
    return told


def main() -> None:
    """Measure, then write or compare. The last line is JSON: golden_equal, runs, differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write golden.json anew")
    write = parser.parse_args().write
    if any(os.environ.get(key) != value for key, value in SAME_EVERYWHERE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SAME_EVERYWHERE})
    import torch

    torch.set_num_threads(1)
    found = measure()
    if write:
        GOLDEN.write_text(json.dumps({"torch": torch.__version__, "runs": found}, indent=1) + "\n")
        print(f"{GOLDEN} written")
        return
    golden = json.loads(GOLDEN.read_text())
    told = differences(found, golden["runs"])
    if golden["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        told.append(f"golden.json is of torch {golden['torch']}, this is {torch.__version__}: write it anew")
    print("\n".join(told), file=sys.stderr)
    print(json.dumps({"golden_equal": not told, "runs": len(found), "differences": len(told)}))
    raise SystemExit(bool(told))


if __name__ == "__main__":
    main()
