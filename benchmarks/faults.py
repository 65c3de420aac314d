"""Kill a run again and again and damage its checkpoints; check that it still ends as an undisturbed run does.

    python benchmarks/faults.py --kills 20

A run is killed with SIGKILL at random moments: one rank, or all ranks with their launcher, in training or while a
checkpoint is being written. Each time it is continued with `--resume auto`. At the end all losses and all trained
factors must equal those of an undisturbed run, bit for bit. Then a copy of the run is damaged in each of several ways;
it must name the damage and go on from the checkpoint before. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.helpers.common import ROOT, launch_environment, train_command
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.run.checkpoint import folder as checkpoints
from sorsa_ds.run.folder import read_metrics
from sorsa_ds.run.paths import ADAPTER, REPORT
from sorsa_ds.runtime.folder_lock import is_held

TRAINED = "adapter_model.safetensors"
SAVE_EVERY = 2
"""Steps between checkpoints."""
SECONDS = 300
"""The longest that anything may take."""


def main() -> None:
    """Kill and damage, print the JSON line; exit code 1 where a run was not recovered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder), steps=8 * arguments.kills)
        project.train("undisturbed")
        result = kills(project, arguments.kills, dice) | damages(project)
    print(json.dumps(result))
    whole = result["kills"] == result["recovered"] == arguments.kills and result["detected"] == result["corruptions"]
    if not whole or result["lost_steps_max"] > 2 * SAVE_EVERY:
        sys.exit(1)


class Project:
    """A small random model, and the command that trains it on two ranks under ZeRO-3."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        tokenizer = AutoTokenizer.from_pretrained(ensure_embedded_model(lambda text: None))
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=256,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")

    def start(self, name: str) -> subprocess.Popen:
        """Start a run, or go on with it where it was begun."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = train_command(
            2, ROOT / "ds_configs/zero3.json", f"model={self.folder / 'model'}", f"train.steps={self.steps}",
            "sorsa.rank=32", "sorsa.dropout=0.1", "train.precision=fp32", "train.micro_batch_size=1",
            "data.max_length=128", "data.eval_size=2", f"output.save_every={SAVE_EVERY}", "train.max_start_gap=1",
            f"output.folder={self.folder}", f"output.name={name}", "--resume", "auto", port=port,
        )  # fmt: skip
        environment = launch_environment() | {"DS_ACCELERATOR": "cpu"}  # where sums are the same bit for bit
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def train(self, name: str) -> None:
        """Train a run to its end.

        Raises:
            RuntimeError: the run failed.
        """
        if self.start(name).wait(SECONDS):
            raise RuntimeError(f"{name} failed:\n{self.told(name)[-3000:]}")

    def told(self, name: str) -> str:
        """Everything that the run has printed."""
        return (self.folder / f"{name}.log").read_text()

    def same(self, name: str) -> bool:
        """Whether a run has the same losses and factors as the undisturbed one."""
        runs = [self.folder / name, self.folder / "undisturbed"]
        losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in runs]
        factors = [load_file(run / ADAPTER / TRAINED) for run in runs]
        return losses[0] == losses[1] and all(torch.equal(factors[0][key], factors[1][key]) for key in factors[1])


def kills(project: Project, count: int, dice: random.Random) -> dict:
    """Kill the run `count` times; all kills count as recovered if it ends like the undisturbed run."""
    run, lost, inside, slowest = project.folder / "killed", [], 0, 0.0
    done = 0
    while done < count:
        process = project.start("killed")
        whole, in_a_save = dice.random() < 0.5, dice.random() < 0.6
        if not wait_for(process, run, dice, in_a_save):
            break
        tree = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in tree if any("launch/train.py" in word for word in child.cmdline()[1:3])]
        inside += bool(list((run / "checkpoints").glob(".step-*")))
        began = time.monotonic()
        for victim in [*tree, psutil.Process(process.pid)] if whole else [dice.choice(ranks)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        process.wait(SECONDS)
        for child in tree:
            child.wait(SECONDS) if child.is_running() else None
        slowest = max(slowest, time.monotonic() - began)
        done += 1
        reached = steps_of(run)
        kept = max((checkpoints.step_of(path) for path in checkpoints.existing(run)), default=0)
        lost.append(reached - kept)
        print(f"kill {done}: {'all' if whole else 'one rank'}, at step {reached}, newest checkpoint {kept}", flush=True)
    if not (run / REPORT).exists():
        project.train("killed")
    return {
        "kills": done, "recovered": done if project.same("killed") else 0, "lost_steps_max": max(lost),
        "kills_inside_a_save": inside, "seconds_to_end_max": slowest,
    }  # fmt: skip


def wait_for(process: subprocess.Popen, run: Path, dice: random.Random, in_a_save: bool) -> bool:
    """Wait for a random moment of training, or of a save; returns False if the run ended first."""
    until = time.monotonic() + SECONDS
    first = None
    wanted = dice.randint(1, 8)
    while process.poll() is None and time.monotonic() < until:
        # A run holds its lock while it trains, and has then cut off what a killed run left behind in its metrics.
        step = steps_of(run) if is_held(run) else 0
        if step and first is None:
            first = step
        if first is not None and step >= first + wanted:
            break
        time.sleep(0.01)
    else:
        return False
    if not in_a_save:
        time.sleep(dice.random())
        return process.poll() is None
    while process.poll() is None and time.monotonic() < until:
        if list((run / "checkpoints").glob(".step-*")):
            time.sleep(dice.random() * 0.01)
            return True
    return False


def steps_of(run: Path) -> int:
    """The last step in a run's log; 0 where the log cannot be read, as while a line is being written."""
    try:
        return max((line["step"] for line in read_metrics(run)), default=0)
    except (OSError, ValueError):
        return 0


def damages(project: Project) -> dict:
    """Damage the newest checkpoint of a copy in each way; count the damages that are named and recovered from."""
    kinds = {
        "truncated": lambda path: os.truncate(path / "rank-00000.safetensors", 100),
        "is damaged": lambda path: flip(path / "rank-00001.safetensors"),
        "cannot be read": lambda path: (path / "rank-00001.safetensors").unlink(),
        "not a checkpoint": lambda path: (path / "checkpoint.json").write_text("{}"),
        "which is not there": lambda path: (path.parent / "latest").write_text("step-999999"),
    }
    detected = 0
    for number, (sign, damage) in enumerate(kinds.items()):
        name = f"damaged-{number}"
        shutil.copytree(project.folder / "killed", project.folder / name)
        (project.folder / name / REPORT).unlink()
        damage(checkpoints.existing(project.folder / name)[0])
        project.train(name)
        found = sign in project.told(name) and project.same(name)
        detected += found
        print(f"{sign}: {'detected, recovered' if found else 'MISSED'}", flush=True)
    return {"corruptions": len(kinds) + 1, "detected": detected + wrong_base(project)}


def wrong_base(project: Project) -> bool:
    """Whether a base model with one changed weight is refused by name."""
    name = "wrong-base"
    shutil.copytree(project.folder / "killed", project.folder / name)
    (project.folder / name / REPORT).unlink()
    file = project.folder / "model" / "model.safetensors"
    good = file.read_bytes()
    weights = load_file(file)
    changed = next(key for key in weights if "up_proj" in key)
    weights[changed] = weights[changed] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    code = project.start(name).wait(SECONDS)
    file.write_bytes(good)
    found = code == 2 and f"{changed} is not the weight that was trained on" in project.told(name)
    print(f"wrong base: {'refused' if found else 'MISSED'}", flush=True)
    return found


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


if __name__ == "__main__":
    main()
