"""Kill a run again and again, disturb it and damage its checkpoints; check that it ends as an undisturbed run does.

    python benchmarks/faults.py --kills 20

A run is killed with SIGKILL at random moments: one rank, or all ranks with their launcher, in training or while a
checkpoint is being written. Each time it is continued with `--resume auto`. At the end all losses and all trained
factors must equal those of an undisturbed run, bit for bit. Then a copy of the run is damaged in each of several ways;
it must name the damage and go on from the checkpoint before. At last runs meet mishaps that kill nobody: their launcher
is killed, their port is taken, their folder is renamed, removed or littered. Each must be told, end with a code that
fits, touch no other run, and leave a run that goes on. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file, save_file

from benchmarks.helpers.mishaps import mishaps
from benchmarks.helpers.victim import SAVE_EVERY, SECONDS, UNDISTURBED, Project, wait_for_all
from sorsa_ds.run.checkpoint import folder as checkpoints
from sorsa_ds.run.paths import REPORT


def main() -> None:
    """Kill and damage, print the JSON line; exit code 1 where a run was not recovered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        killed = Project(Path(folder) / "killed", steps=8 * arguments.kills)
        disturbed = Project(Path(folder) / "disturbed", steps=40)
        projects = killed, disturbed
        try:
            for project in projects:
                project.train(UNDISTURBED)
            result = kills(killed, arguments.kills, dice) | damages(killed) | mishaps(disturbed)
        finally:
            for project in projects:
                project.end_all()
    print(json.dumps(result))
    whole = result["kills"] == result["recovered"] == arguments.kills and result["detected"] == result["corruptions"]
    if not whole or result["survived"] < result["mishaps"] or result["lost_steps_max"] > 2 * SAVE_EVERY:
        sys.exit(1)


def kills(project: Project, count: int, dice: random.Random) -> dict:
    """Kill the run `count` times; all kills count as recovered if it ends like the undisturbed run."""
    run, lost, inside, slowest = project.folder / "killed", [], 0, 0.0
    done = 0
    while done < count:
        process = project.start("killed")
        whole, in_a_save = dice.random() < 0.5, dice.random() < 0.6
        if not wait_for(project, process, dice, in_a_save):
            break
        tree = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in tree if any("launch/train.py" in word for word in child.cmdline()[1:3])]
        inside += bool(list((run / "checkpoints").glob(".step-*")))
        began = time.monotonic()
        for victim in [*tree, psutil.Process(process.pid)] if whole else [dice.choice(ranks)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        process.wait(SECONDS)
        wait_for_all(tree)
        slowest = max(slowest, time.monotonic() - began)
        done += 1
        reached = project.steps_of("killed")
        kept = max((checkpoints.step_of(path) for path in checkpoints.existing_checkpoints(run)), default=0)
        lost.append(reached - kept)
        print(f"kill {done}: {'all' if whole else 'one rank'}, at step {reached}, newest checkpoint {kept}", flush=True)
    if not (run / REPORT).exists():
        project.train("killed")
    return {
        "kills": done, "recovered": done if project.same("killed") else 0, "lost_steps_max": max(lost),
        "kills_inside_a_save": inside, "seconds_to_end_max": slowest,
    }  # fmt: skip


def wait_for(project: Project, process: subprocess.Popen, dice: random.Random, in_a_save: bool) -> bool:
    """Wait for a random moment of training, or of a save; returns False if the run ended first."""
    if not project.wait_for_step("killed", process, dice.randint(1, 8)):
        return False
    if not in_a_save:
        time.sleep(dice.random())
        return process.poll() is None
    until = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < until:
        if list((project.folder / "killed" / "checkpoints").glob(".step-*")):
            time.sleep(dice.random() * 0.01)
            return True
    return False


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
        damage(checkpoints.existing_checkpoints(project.folder / name)[0])
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
