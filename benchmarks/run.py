"""Everything that is measured against peers, on the machine that this runs on, in one table and one JSON object.

    python benchmarks/run.py                                  80 minutes on two cores
    python benchmarks/run.py --only steps layer regularizer   some parts
    python benchmarks/run.py --tiny                           all parts in tiny sizes: whether it runs, not how fast

With a GPU the parts take the papers' sizes: Llama 2 7B's shape with made-up weights, r = 128, sequences of 512 tokens;
and Llama 2 70B's shape over 4 bits. Each part is a script of its own in this folder, with a help of its own; parts run
one after the other, and the sides of a part in turns. `--output` gets everything, with hardware and versions.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from benchmarks.helpers.common import say
from benchmarks.helpers.peers import reference_layers

FOLDER = Path(__file__).parent
SHAPES = FOLDER.parent / "sorsa_ds" / "shapes"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "bitsandbytes", "sorsa")
LLAMA_7B, LLAMA_70B = str(SHAPES / "llama2_7b"), str(SHAPES / "llama2_70b")
PAPER = ["--shape", LLAMA_7B, "--rank", "128", "--batch", "2", "--length", "512", "--precision", "mixed"]
"""A step of it on one GPU; micro-batches of two."""

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
"""Parts whose figures' names do not say of what they are."""

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
}  # fmt: skip


def main() -> None:
    """Run the parts, print the table and the JSON line; exit code 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CPU), help="these parts")
    parser.add_argument("--tiny", action="store_true", help="in tiny sizes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"))
    a = parser.parse_args()
    parts = TINY if a.tiny else GPU if torch.cuda.is_available() else CPU
    if lacking := sorted(set(a.only or ()) - parts.keys()):
        parser.error(f"--only: {', '.join(lacking)}: not on this machine or in this mode; there are {', '.join(parts)}")
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
    """One part; what it prints goes on to the console, but for the JSON of its last line: that, and whether all of it
    ended well."""
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
    """Of Python and the packages; None for one that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """What of this repository is measured, with `-dirty` where it was changed; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=FOLDER, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def hardware() -> dict:
    """What it ran on."""
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
