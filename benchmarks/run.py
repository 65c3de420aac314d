"""Everything that is measured against peers, on the machine that this runs on, in one table and one JSON object.

    python benchmarks/run.py                                  about an hour on two cores
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
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from common import say
from peers import reference_layers

FOLDER = Path(__file__).parent
SHAPES = FOLDER.parent / "sorsa_ds" / "shapes"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")

CPU = {
    "layer": [["layer.py"]],
    "regularizer": [["regularizer.py"]],
    "steps": [["steps.py"]],
    "quantized": [["quantized.py", "--steps", "8"]],
    "init": [["init.py"]],
    "checkpoint": [["checkpoint.py"]],
    "startup": [["startup.py"]],
    "profile": [["profile_step.py"]],
    "alternatives": [["alternatives.py"]],
}
GPU = {
    "layer": [["layer.py", "--shape", "4096", "4096", "--dtype", "bf16"]],
    "regularizer": [["regularizer.py"]],
    "steps": [["steps.py", "--shape", str(SHAPES / "llama2_7b"), "--rank", "128", "--batch", "2", "--length", "512",
               "--precision", "mixed", "--stages", "0"]],
    "quantized": [["quantized.py", "--shape", str(SHAPES / "llama2_70b"), "--storage", "nf4_double", "--rank", "128",
                   "--lengths", "512", "2048"]],
    "profile": [["profile_step.py", "--shape", str(SHAPES / "llama2_7b"), "--rank", "128", "--batch", "2", "--length",
                 "512", "--precision", "mixed"]],
    "alternatives": [["alternatives.py", "--shape", str(SHAPES / "llama2_7b"), "--linear", "4096", "4096", "--rank",
                      "128", "--batch", "2", "--length", "512", "--precision", "mixed"]],
}  # fmt: skip
TINY = {
    "layer": [["layer.py", "--shape", "64", "48", "--tokens", "1", "32", "--ranks", "4", "--rounds", "2"]],
    "regularizer": [["regularizer.py", "--layers", "1", "--rank", "8", "--rounds", "2"]],
    "steps": [["steps.py", "--shape", "TINY", "--rank", "4", "--batch", "2", "--length", "16", "--rounds", "2",
               "--precision", "mixed", "--stages", "0"]],
    "quantized": [["quantized.py", "--shape", "TINY", "--storage", "nf4_double", "--rank", "4", "--lengths", "16", "32",
                   "--timed", "2"]],
    "profile": [["profile_step.py", "--shape", "TINY", "--rank", "4", "--length", "16"]],
    "alternatives": [["alternatives.py", "--tiny"]],
}  # fmt: skip
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
    result: dict = {"failed": []}
    told: dict = {"hardware": hardware(), "versions": {name: version(name) for name in PACKAGES}, "seconds": {}}
    told["date"] = time.strftime("%Y-%m-%d")
    a.output.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        began = time.perf_counter()
        for command in parts[name]:
            found = run(command, a.output.parent)
            if found is None:
                result["failed"].append(name)
            else:
                result |= found
        told["seconds"][name] = round(time.perf_counter() - began, 1)
        a.output.write_text(json.dumps({**told, "results": result}, indent=1) + "\n")
    say("")
    for key, value in sorted(result.items()):
        if isinstance(value, int | float):
            say(f"{key:40} {value:.4g}")
    print(json.dumps(result))
    sys.exit(1 if result["failed"] else 0)


def run(command: list[str], folder: Path) -> dict | None:
    """One part; what it printed goes on to the console. The JSON of its last line, None where it failed."""
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
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    if process.wait():
        return None
    return json.loads(last)


def hardware() -> dict:
    """What it ran on."""
    found = {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


if __name__ == "__main__":
    main()
