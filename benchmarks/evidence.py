"""What SORSA is good for: methods and variants over their learning rates and seeds, in parts that can be resumed.

    python benchmarks/evidence.py --gsm8k FOLDER --text FILE --small_model FOLDER --parts small-gsm8k --minutes 60
    python benchmarks/evidence.py --report docs/results     pictures, and tables of everything that is measured
    python benchmarks/evidence.py --summary

Each run is trained by the trainer itself and measured: held-out loss, drift (KL from the base model to the tuned one on
the base model's own samples), losses on English and code, choices among continuations, condition numbers, Delta-Sigma
and Delta-D. One row per run goes into a CSV file as soon as it is over; the same command goes on where it was stopped,
also with another `--minutes`. `--summary` reads the CSV alone. The last line is one JSON object.
"""

import argparse
import csv
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.helpers.common import ROOT, launch_environment, say
from benchmarks.helpers.evidence_figures import draw
from benchmarks.helpers.evidence_summary import summary
from benchmarks.helpers.evidence_tables import tables
from benchmarks.helpers.evidence_trials import PARTS, VARIANTS, Trial, as_rows, due, trial_of
from sorsa_ds.runtime.files import write_text

CSV = ROOT / "docs" / "results" / "evidence.csv"
RUNS_OF_A_WORKER = 30
"""A worker is replaced after so many runs, so that nothing that a run leaves in memory adds up."""


def main() -> None:
    """Make the runs that are due, or summarise those that are made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="only read the CSV file")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="draw pictures there and print tables instead")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--variants", nargs="+", help="only these of a part")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl of GSM-8K")
    parser.add_argument("--text", type=Path, help="JSON file of rows with instruction, input and output")
    parser.add_argument("--small_model", help="folder of a small model, such as stories260k")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--steps", type=int, help="of every run, to try it out")
    a = parser.parse_args()
    if (a.summary or a.report) and not a.csv.is_file():
        parser.error(f"--csv: there is no {a.csv}")
    failed: list[str] = []
    if a.report is not None:
        rows = read(a.csv)
        a.report.mkdir(parents=True, exist_ok=True)
        say(f"wrote {', '.join(map(str, draw(rows, a.report)))}")
        say(tables(rows))
    elif not a.summary:
        check(a, parser)
        failed = make_runs(a)
    print(json.dumps(summary(read(a.csv))))
    if failed:
        parser.exit(2, f"no run of {', '.join(failed)} has come to its end; what they said stands above\n")


def check(a: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Stop before the first run where something is missing or has no such name."""
    if not (a.gsm8k and a.text and a.small_model):
        parser.error("runs need --gsm8k, --text and --small_model")
    for option, path in (
        ("--gsm8k", a.gsm8k / "train.jsonl"), ("--gsm8k", a.gsm8k / "test.jsonl"), ("--text", a.text),
        ("--small_model", Path(a.small_model) / "config.json"),
    ):  # fmt: skip
        if not path.is_file():
            parser.error(f"{option}: there is no {path}")
    for variant in a.variants or ():
        if not any(variant in PARTS[name].variants for name in a.parts):
            parser.error(f"--variants: no part of {', '.join(a.parts)} has {variant}; there are {', '.join(VARIANTS)}")


def read(path: Path) -> list[dict]:
    """The rows of the table; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def make_runs(a: argparse.Namespace) -> list[str]:
    """Give what is due to the workers until nothing is due, or the time is over; returns the parts that all failed."""
    failed = []
    until = time.monotonic() + 60 * a.minutes
    for name in a.parts:
        part = PARTS[name]
        if a.variants:
            part = replace(part, variants=tuple(v for v in part.variants if v in a.variants))
        while time.monotonic() < until:
            rows = read(a.csv)
            losses = {trial_of(row): float(row["eval_loss"]) for row in rows}
            trials = due(part, losses)
            if not trials:
                break
            say(f"{name}: {len(trials)} runs are due")
            if not in_workers(trials, a, until):
                return failed
            if len(read(a.csv)) == len(rows):
                failed.append(name)
                break
    return failed


def in_workers(trials: list[Trial], a: argparse.Namespace, until: float) -> bool:
    """Make runs in several processes; returns whether all of them are made."""
    waiting: queue.Queue[dict] = queue.Queue()
    for row in as_rows(trials):
        waiting.put(row)
    lock = threading.Lock()
    threads = [threading.Thread(target=feed, args=(waiting, a, until, lock)) for _ in range(a.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waiting.empty()


def feed(waiting: queue.Queue[dict], a: argparse.Namespace, until: float, lock: threading.Lock) -> None:
    """Send runs to a worker, one after the other, and write its answers down."""
    command = [
        sys.executable, "-m", "benchmarks.workers.evidence", "--gsm8k", str(a.gsm8k.resolve()),
        "--text", str(a.text.resolve()), "--small_model", a.small_model, *(["--steps", str(a.steps)] * bool(a.steps)),
    ]  # fmt: skip
    while time.monotonic() < until and not waiting.empty():
        with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            command, cwd=ROOT, env=launch_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors,
        ) as worker:  # fmt: skip
            for _ in range(RUNS_OF_A_WORKER):
                try:
                    trial = waiting.get_nowait()
                except queue.Empty:
                    break
                worker.stdin.write(json.dumps(trial) + "\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    worker.wait()
                    errors.seek(0)
                    say(f"failed: {trial}: {errors.read()[-2000:]}")
                    break
                row = trial | json.loads(answer)
                with lock:
                    add(a.csv, row)
                say(f"{Trial(**trial).name}: loss {row['eval_loss']:.4f}, drift {row['drift']:.3f}")
                if time.monotonic() > until:
                    break
            worker.stdin.close()


def add(path: Path, row: dict) -> None:
    """Add a row to the table, which is written anew as a whole."""
    rows = [*read(path), row]
    lines = [",".join(row)]
    lines += [",".join("" if one[key] in (None, "") else _text(one[key]) for key in row) for one in rows]
    write_text(path, "\n".join(lines) + "\n")


def _text(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
