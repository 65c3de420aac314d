"""Everything that is measured against peers, on the machine that this runs on, in one table and one JSON object.

    python benchmarks/run.py                                  80 minutes on two cores
    python benchmarks/run.py --only steps layer regularizer   some parts
    python benchmarks/run.py --tiny                           all parts in tiny sizes, to see that they run

With a GPU the parts take the papers' sizes: Llama 2 7B's shape with random weights, r = 128, sequences of 512 tokens,
and Llama 2 70B's shape with 4-bit weights. Each part is a script in this folder, with its own --help. Parts run one
after the other, and the sides of a part in turns. Everything is written to --output, with hardware and versions.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from benchmarks.helpers.common import TINY_LLAMA, say
from benchmarks.helpers.peers import reference_layers
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.runtime.versions import package_versions

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "bitsandbytes", "sorsa")
LLAMA_7B, LLAMA_70B = (str(shipped(f"meta-llama/Llama-2-{size}-hf")) for size in ("7b", "70b"))
PAPER = ["--shape", LLAMA_7B, "--rank", "128", "--batch", "2", "--length", "512", "--precision", "mixed"]
"""The papers' step on one GPU, in micro-batches of two sequences."""

CPU = {
    "layer": [["layer.py"]],
    "regularizer": [["regularizer.py"]],
    "steps": [["steps.py"]],
    "quantized": [["quantized.py", "--steps", "4"]],
    "init": [["init.py", "--repeats", "1", "--peft_ranks", "16", "128"]],
    "checkpoint": [["checkpoint.py"]],
    "startup": [["startup.py"]],
    "profile": [["profile_step.py"]],
    "alternatives": [["alternatives.py"]],
}
GPU = {
    "layer": [["layer.py", "--shape", "4096", "4096", "--dtype", "bf16"]],
    "regularizer": [["regularizer.py"]],
    "steps": [["steps.py", *PAPER, "--together", "2", "--world", str(min(2, torch.cuda.device_count()))]],
    "quantized": [["quantized.py", "--shape", LLAMA_70B, "--storage", "nf4_double", "--rank", "128", "--lengths", "512",
                   "2048"]],
    "init": [["init_shapes.py"]],
    "checkpoint": [["checkpoint.py"]],
    "startup": [["startup.py", "--ranks", "1", "--ds_config", "ds_configs/stage0.json"]],
    "profile": [["profile_step.py", *PAPER]],
    "alternatives": [["alternatives.py", *PAPER, "--linear", "4096", "4096"]],
}  # fmt: skip
TINY_STEP = ["--shape", "TINY", "--rank", "4", "--length", "16"]
TINY = {
    "layer": [["layer.py", "--shape", "64", "48", "--tokens", "1", "32", "--ranks", "4", "--rounds", "2"]],
    "regularizer": [["regularizer.py", "--layers", "1", "--rank", "8", "--rounds", "2"]],
    "steps": [["steps.py", *TINY_STEP, "--precision", "mixed", "--together", "3", "--rounds", "2"]],
    "quantized": [["quantized.py", "--shape", "TINY", "--storage", "nf4_double", "--rank", "4", "--lengths", "16", "32",
                   "--timed", "2"]],
    "init": [["init_shapes.py", "--model", "tiny", "--rank", "16"]],
    "checkpoint": [["checkpoint.py", "--gib", "0.1"]],
    "startup": [["startup.py", "--ranks", "1", "--ds_config", "ds_configs/stage0.json"]],
    "profile": [["profile_step.py", *TINY_STEP]],
    "alternatives": [["alternatives.py", "--tiny"]],
}  # fmt: skip
BARE = ("quantized", "init", "checkpoint")
"""Parts whose figures get the part's name in front, because their own names do not tell what they are of."""


def main() -> None:
    """Run the parts, print the table and the JSON line; exit code 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CPU), help="run these parts only")
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"), help="file for all results, as JSON")
    a = parser.parse_args()
    parts = TINY if a.tiny else GPU if torch.cuda.is_available() else CPU
    wanted = [name for name in parts if a.only is None or name in a.only]
    if {"layer", "regularizer", "steps"} & set(wanted):
        try:
            reference_layers()
        except ValueError as error:
            parser.error(str(error))
    failed: list[str] = []
    results: dict[str, dict] = {}
    told = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "tiny": a.tiny, "hardware": hardware(),
            "versions": versions(), "commands": {name: parts[name] for name in wanted}, "seconds": {}}  # fmt: skip
    a.output.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        began = time.perf_counter()
        for command in parts[name]:
            found, ended_well = run(command, a.output.parent)
            results[name] = results.get(name, {}) | found
            if not ended_well:
                failed.append(name)
        told["seconds"][name] = round(time.perf_counter() - began, 1)
        a.output.write_text(json.dumps({**told, "failed": failed, "results": results}, indent=1) + "\n")
    say("")
    figures = {
        f"{name}_{key}" if name in BARE else key: value
        for name, found in results.items()
        for key, value in found.items()
        if isinstance(value, int | float)
    }
    for key, value in sorted(figures.items()):
        say(f"{key:48} {value:.4g}")
    print(json.dumps({"failed": failed, **figures}))
    sys.exit(1 if failed else 0)


def run(command: list[str], folder: Path) -> tuple[dict, bool]:
    """Run one part; returns the JSON of its last line, and whether it ended well. All other lines are printed.

    folder: where the tiny model is written that some commands name.
    """
    if "TINY" in command:
        shape = folder / "tiny_llama"
        shape.mkdir(parents=True, exist_ok=True)
        (shape / "config.json").write_text(json.dumps(TINY_LLAMA))
        command = [str(shape) if word == "TINY" else word for word in command]
    say(f"\n# python benchmarks/{' '.join(command)}")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / command[0]), *command[1:]], env=environment, text=True, stdout=subprocess.PIPE
    )
    held = ""
    for line in process.stdout:
        if line.strip():
            print(held, end="", flush=True)
            held = ""
        held += line
    ended_well = process.wait() == 0
    try:
        return json.loads(held), ended_well
    except json.JSONDecodeError:
        print(held, end="", flush=True)
        return {}, False


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages; None for a package that is not installed."""
    return {"python": platform.python_version(), **dict.fromkeys(PACKAGES), **package_versions(PACKAGES)}


def commit() -> str | None:
    """The commit that is measured, with `-dirty` where files are changed; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=FOLDER, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def hardware() -> dict:
    """The processor, memory and GPUs of this machine."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = {
        "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(),
        "threads_a_rank": os.environ.get("OMP_NUM_THREADS", "1"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }  # fmt: skip
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
                  "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}  # fmt: skip
    return found


if __name__ == "__main__":
    main()
