"""Every causal language model that transformers has, in tiny, through the whole product: which ones work?

    python benchmarks/families.py                          all families, an hour of one core
    python benchmarks/families.py --only llama mamba       some of them
    python benchmarks/families.py --write docs/models.md   writes the page with the table
    python benchmarks/families.py --ranks 2 --stage 3      two ranks under ZeRO-3 in place of one process

For each family a random model with four layers is written in bf16. The trainer adapts it in fp32 and makes two steps;
step 0 is compared with transformers' own load of the same files, and the exports with the trained model. What
transformers itself cannot make or load again is listed as not built. The last line is one JSON object; exit code 1
where a family crashes, differs, or trains less than a half of its weights without saying so.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.helpers.common import say
from benchmarks.helpers.family_run import LARGEST_GAP, Row, examine
from benchmarks.helpers.tiny_models import WHOLE

SUFFIX = " (whole)"
"""What marks a family whose class with vision or audio is trained, where its language model has a class of its own."""

FORK = multiprocessing.get_context("fork")

PAGE = f"""# Models

Every family of transformers' causal language models, and some that see too, through the whole product: a tiny random
model of the family is written, trained for two steps in fp32, and exported. `python benchmarks/families.py --write
docs/models.md` has made this page.

- **pass**: the adapted model at step 0 has the logits of transformers' own load, and the merged export, loaded by
  transformers, and the LoRA export, loaded by PEFT, have those of the trained model, all within {LARGEST_GAP:.0e}.
- **refused**: a message says what does not work and what to do, before any step.
- **not built**: transformers itself does not make or reload a tiny model of the family here, for the reason given.

"Adapted" counts what `adapter.targets: all-linear` means; "share" is that of the weights between the embeddings and the
output head. A run says both in its first lines, with what is left out, and warns where the share is below a half.
"{SUFFIX.strip()}" marks checkpoints of the class that sees or hears, of which the language model is trained.

| family | class | result | adapted | share | remarks |
|---|---|---|---|---|---|
"""


def main() -> int:
    """Examine the families, print a line for each and the JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name + SUFFIX for name in WHOLE)]
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families; 'NAME (whole)' is one too")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there, or its rows of --only anew")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train (default: %(default)s)")
    parser.add_argument("--stage", type=int, default=0, choices=range(4), help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=180, help="that a phase may take (default: %(default)s)")
    a = parser.parse_args()
    if unknown := [name for name in a.only or () if name not in known]:
        parser.error(f"--only: transformers has no {', '.join(unknown)}")
    rows = []
    for row, seconds in _examined(a.only or known, a.jobs, a.ranks, a.stage, a.seconds):
        rows.append(row)
        if a.write:
            _write(a.write, rows)
        gaps = ", ".join(f"{name} {gap:.0e}" for name, gap in row.gaps.items())
        say(f"{row.family:32} {row.result:10} {seconds:5.0f} s  {row.share:4.0%}  {gaps}  {row.reason or row.no_lora}")
    counts = Counter(row.result for row in rows)
    result = {
        "built": len(rows) - counts["not built"],
        **{name: counts[name] for name in ("pass", "refused", "crash", "wrong")},
        "silent_share_below_half": sum(row.silent for row in rows),
        "moe_pass": sum(row.result == "pass" and row.adapted_experts > 0 for row in rows),
    }
    print(json.dumps(result))
    return 1 if result["crash"] or result["wrong"] or result["silent_share_below_half"] else 0


def _examined(names: list[str], jobs: int, ranks: int, stage: int, seconds: float) -> Iterator[tuple[Row, float]]:
    """The families' rows as they come, each with the seconds that it took."""
    left, done = FORK.SimpleQueue(), FORK.SimpleQueue()

    def work() -> None:
        while (name := left.get()) is not None:
            began = time.perf_counter()
            row = examine(name.removesuffix(SUFFIX), name.endswith(SUFFIX), ranks, stage, seconds)
            done.put((row, time.perf_counter() - began))

    workers = [FORK.Process(target=work) for _ in range(min(jobs, len(names)))]
    for worker in workers:
        worker.start()
    for name in [*names, *(None for _ in workers)]:
        left.put(name)
    for _ in names:
        yield done.get()
    for worker in workers:
        worker.join()


def _write(page: Path, rows: list[Row]) -> None:
    """Write the page, after every family: what is measured stays if the rest is not. Other rows are kept."""
    before = page.read_text(encoding="utf-8").removeprefix(PAGE).splitlines(keepends=True) if page.exists() else []
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in before if line.startswith("| ")}
    lines |= {row.family: _line(row) for row in rows}
    page.write_text(PAGE + "".join(lines[name] for name in sorted(lines)), encoding="utf-8")


def _line(row: Row) -> str:
    """A row of the page's table: nothing in it changes from one machine to the next."""
    adapted = f"{row.linears} linears" if row.linears else ""
    if row.experts:
        adapted += f", {row.adapted_experts} of {row.experts} expert tensors"
    share = f"{row.share:.1%}" if row.linears else ""
    remarks = [row.reason, f"left out: {row.left_out}" if row.left_out else "", row.no_lora]
    cells = (row.family, row.model, row.result, adapted, share, "; ".join(filter(None, remarks)))
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
