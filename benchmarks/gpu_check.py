"""Everything that only a GPU can show, in one run of a few minutes (`benchmarks/gpu_check.sh`).

    python benchmarks/gpu_check.py                        all parts, in the papers' sizes on a GPU
    python benchmarks/gpu_check.py --tiny                 all parts in tiny sizes, on a CPU too
    python benchmarks/gpu_check.py --only tests step_2    some parts

tests      pytest -m gpu
train      launch/train.py through DeepSpeed's launcher: a whole run with its checkpoint, adapter and report
layer      one linear of 4096 x 4096: SorsaLinear, PEFT's LoRA, the authors' layer, and the frozen linear alone
experts    the experts of a layer of Qwen3-30B-A3B: SORSA, PEFT's LoRA, and the frozen experts alone
step_2     a model of Llama 2 7B's shape with made-up weights, r = 128, sequences of 512 tokens, micro-batches of 2:
           seconds of initialisation and of a step, tokens/s, utilisation, planned and measured memory, for SORSA, LoRA,
           PiSSA, with and without checkpointing
step_16    the same in micro-batches of 16
nf4        a model of Llama 2 70B's shape over a residual in nf4 with quantised scales: initialised and stepped
profile    the ten kernels that take most of a step in micro-batches of 16

Each part is a process of its own with a time limit; a failed part is reported, and the others still run. The output is
a table in Markdown, a file of JSON with everything, and one JSON line, the last, whose `gpu` is null where there is
none.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.helpers.common import ROOT, TINY_LLAMA
from benchmarks.run import LLAMA_7B, LLAMA_70B, commit, hardware, versions

WORKER = "benchmarks.workers.gpu_check"
PARTS = ("tests", "train", "layer", "experts", "step_2", "step_16", "nf4", "profile")
LIMITS = {
    "tests": 150, "train": 60, "layer": 40, "experts": 40, "step_2": 110, "step_16": 120, "nf4": 180, "profile": 60,
}  # fmt: skip
"""Seconds after which a part is stopped."""
GOLDEN = ROOT / "tests" / "golden"


def commands(tiny: bool, shape: Path, folder: Path) -> dict[str, list[str]]:
    """The command of each part.

    shape: the folder with the tiny model's config.json.
    """
    here = [sys.executable, "-m", WORKER]
    small, large = ([str(shape)] * 2) if tiny else (LLAMA_7B, LLAMA_70B)
    sizes = ["--rank", "4", "--length", "16", "--rounds", "2"] if tiny else ["--rank", "128", "--length", "512"]
    layer = ["--shape", "64", "48", "--tokens", "32", "--ranks", "4", "--rounds", "2"]
    if not tiny:
        layer = ["--shape", "4096", "4096", "--tokens", "1024", "8192", "--ranks", "128", "--rounds", "9"]
    experts = ["--shape", "4", "32", "16", "--tokens", "32", "--top-k", "2", "--rounds", "2"]
    if not tiny:
        experts = ["--shape", "128", "2048", "768", "--tokens", "1024", "8192", "--top-k", "8", "--rounds", "9"]
    return {
        "tests": [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-s", "-p", "no:cacheprovider",
                  "--continue-on-collection-errors", "tests"],
        "train": [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "launch/train.py",
            "--ds_config", "ds_configs/stage0.json", f"model={GOLDEN / 'model'}", f"data.path={GOLDEN / 'rows.jsonl'}",
            "data.eval_size=4", "adapter.rank=4", "train.steps=6", "train.global_batch_size=4",
            "train.learning_rate=1e-3", "output.save_every=3", f"output.folder={folder}", "output.name=gpu_check",
        ],
        "layer": [sys.executable, "benchmarks/layer.py", "--dtype", "bf16", *layer],
        "experts": [sys.executable, "benchmarks/experts.py", "--dtype", "bf16", *experts],
        "step_2": [*here, "steps", "--shape", small, "--batch", "2", *sizes],
        "step_16": [*here, "steps", "--shape", small, "--batch", "16", *sizes],
        "nf4": [*here, "nf4", "--shape", large, "--batch", "1", *sizes],
        "profile": [sys.executable, "benchmarks/profile_step.py", "--precision", "mixed", "--shape", small,
                    "--batch", "16", *sizes],
    }  # fmt: skip


def main() -> None:
    """Run the parts, write the table and the JSON; exit code 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument("--tiny", action="store_true", help="in tiny sizes")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="of the .json, .md and .log files")
    a = parser.parse_args()
    if not a.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can see; --tiny proves the parts on a CPU")
    wanted = [name for name in PARTS if a.only is None or name in a.only]
    parts: dict[str, dict] = {}
    a.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, a.output.with_suffix(".log").open("w") as log:
        shape = Path(folder) / "tiny_llama"
        shape.mkdir()
        (shape / "config.json").write_text(json.dumps(TINY_LLAMA))
        for name in wanted:
            parts[name], printed = run_part(name, commands(a.tiny, shape, Path(folder))[name], Path(folder))
            log.write(f"# {name}\n{printed}\n")
            log.flush()
            told = told_of(a.tiny, parts)
            a.output.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    table = "\n".join(rows(parts))
    a.output.with_suffix(".md").write_text(table + "\n")
    print(f"\n{table}\n")
    print(json.dumps(told))
    sys.exit(1 if told["failed"] else 0)


def told_of(tiny: bool, parts: dict[str, dict]) -> dict:
    """The whole result. gpu: its name, or None where there is none."""
    found = hardware()
    return {
        "gpu": found.get("gpu"), "tiny": tiny, "date": time.strftime("%Y-%m-%d"), "commit": commit(),
        "hardware": found, "versions": versions(),
        "failed": [name for name, part in parts.items() if not part["ok"]], "parts": parts,
    }  # fmt: skip


def run_part(name: str, command: list[str], folder: Path) -> tuple[dict, str]:
    """One part: whether it ended well, its seconds and its result; and everything that it printed."""
    print(f"# {name}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SORSA_CACHE": str(folder / "cache")}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, timeout=LIMITS[name],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        printed, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        printed, code = (late.stdout or b"").decode(errors="replace"), -1
    part = {"ok": code == 0, "seconds": round(time.monotonic() - began, 1), **result_of(name, printed, folder)}
    if code == 5 and name == "tests":
        part["ok"] = True  # nothing was selected
    if not part["ok"]:
        part["error"] = f"exit code {code}" if code != -1 else f"stopped after {LIMITS[name]} s"
        print(f"{part['error']}:\n{printed[-3000:]}", flush=True)
    return part, printed


def result_of(name: str, printed: str, folder: Path) -> dict:
    """What a part has to tell: pytest's counts, a run's report, or the JSON of the last line that is one."""
    if name == "tests":
        found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", printed)
        return {kind: int(number) for number, kind in found}
    if name == "train":
        report = folder / "gpu_check" / "report.json"
        return {"report": json.loads(report.read_text())} if report.exists() else {}
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {}


def rows(parts: dict[str, dict]) -> list[str]:
    """The table, as lines of Markdown."""
    lines = ["| what | measured |", "|---|---|"]

    def add(what: str, measured: str) -> None:
        lines.append(f"| {what} | {measured} |")

    for name, part in parts.items():
        if not part["ok"]:
            add(name, f"failed after {part['seconds']} s")
    if "tests" in parts:
        counts = (
            f"{parts['tests'][kind]} {kind}" for kind in ("passed", "failed", "skipped") if kind in parts["tests"]
        )
        add("pytest -m gpu", ", ".join(counts))
    if "report" in parts.get("train", {}):
        report = parts["train"]["report"]
        add("launch/train.py", f"loss {report['loss_first']:.3f} to {report['loss_last']:.3f}, peak "
            f"{report['peak_memory_gib']:.2f} GiB")  # fmt: skip
    for peer in ("frozen", "lora", "reference"):
        if f"layer_vs_{peer}" in parts.get("layer", {}):
            add(f"one layer, SORSA over {peer}", f"{parts['layer'][f'layer_vs_{peer}']:.3f} of its time")
        if f"experts_vs_{peer}" in parts.get("experts", {}):
            add(f"experts, SORSA over {peer}", f"{parts['experts'][f'experts_vs_{peer}']:.3f} of its time")
    for name in ("step_2", "step_16"):
        for side, one in parts.get(name, {}).get("sides", {}).items():
            add(f"{name}, {side}", told_of_side(one))
    if "nf4" in parts and parts["nf4"].get("sides"):
        add("70B's shape over nf4_double", told_of_side(parts["nf4"]["sides"]["nf4_double"]))
    for kernel, share in parts.get("profile", {}).get("profile", []):
        add(f"`{kernel[:80]}`", f"{share:.1%} of a step")
    return lines


def told_of_side(one: dict) -> str:
    """One side in words."""
    if "error" in one:
        return one["error"]
    told = [f"initialised in {one['initialisation_seconds']:.1f} s", f"{1e3 * one['step_seconds']:.0f} ms per step",
            f"{one['tokens_per_second']:,.0f} tokens/s"]  # fmt: skip
    if one["utilisation"] is not None:
        told.append(f"{one['utilisation']:.1%} of {one['peak_tflops']:.0f} TFLOP/s")
    if one["peak_gib"] is not None:
        told.append(f"peak {one['peak_gib']:.1f} GiB, planned {one['planned_gib']:.1f}")
    return ", ".join(told)


if __name__ == "__main__":
    main()
