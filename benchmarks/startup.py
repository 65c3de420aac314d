"""Seconds from the command to the end of the first step: a new run, and one whose factors are in the cache.

    python benchmarks/startup.py                  the default model on two ranks under ZeRO-3

Everything is in it, through the real launcher: processes, data, model, decomposition, the check of the start, one step.
The last line is one JSON object.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.helpers.common import ROOT, launch_environment, say, train_command


def main() -> None:
    """Start two runs with the same cache of factors, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ds_config", default="ds_configs/zero3.json")
    parser.add_argument("settings", nargs="*", help="further settings of the run")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {f"startup_seconds_{name}": first_step(a, Path(folder), name) for name in ("new", "cached")}
    for key, value in result.items():
        say(f"{key:28} {value:.1f}")
    print(json.dumps(result))


def first_step(a: argparse.Namespace, folder: Path, name: str) -> float:
    """Seconds until the log has the line of the first step, which is also the last.

    Raises:
        RuntimeError: the run failed.
    """
    command = train_command(
        a.ranks, a.ds_config, "train.steps=1", "data.eval_size=0", "output.save_every=0", f"output.folder={folder}",
        f"output.name={name}", f"sorsa.svd_cache={folder / 'factors'}", *a.settings,
    )  # fmt: skip
    began = time.perf_counter()
    run = subprocess.Popen(command, cwd=ROOT, env=launch_environment(), text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)  # fmt: skip
    log, seconds = folder / name / "metrics.jsonl", None
    while seconds is None and run.poll() is None:
        time.sleep(0.05)
        if log.exists() and '"loss"' in log.read_text():
            seconds = time.perf_counter() - began
    printed, _ = run.communicate()
    if run.returncode or seconds is None:
        raise RuntimeError(f"the run failed:\n{printed[-3000:]}")
    return seconds


if __name__ == "__main__":
    main()
