"""What becomes of people's data: is it learned as written, what does a start cost, and what does its size take?

    python benchmarks/data.py

It learns conversations under every chat template that TRL carries, and files and rows of every kind that people have;
it starts twice on the same rows, opens a million stored examples, and compares packed rows with their examples one by
one. The last line is one JSON object; exit code 1 where anything is learned otherwise than written.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from benchmarks.helpers.chat_templates import count_exact
from benchmarks.helpers.common import say
from benchmarks.helpers.data_size import rank_mib_per_million_rows, start_seconds_cached
from benchmarks.helpers.packed_loss import FAMILIES, packed_loss_difference
from benchmarks.helpers.silent_changes import CASES, silent_changes
from tests.helpers.chat_tokenizer import chat_tokenizer


def main() -> int:
    """Measure, print what was found and the JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows that a start reads (default: %(default)s)")
    parser.add_argument(
        "--stored", type=int, default=10**6, help="stored examples, 1600 bytes each (default: %(default)s)"
    )
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, SORSA_CACHE=str(Path(name, "cache"))):
        result = measure(Path(name), a.rows, a.stored)
    print(json.dumps(result))
    wrong = result["silent_changes"] or result["templates_exact"] != result["templates"]
    return 1 if wrong else 0


def measure(folder: Path, rows: int, stored: int) -> dict[str, float]:
    """Everything, one after the other, with a line each for people.

    Args:
        folder: an empty one.
        rows: the number of rows that a start reads.
        stored: the number of stored examples that a rank opens.
    """
    templates, exact = count_exact()
    say(f"chat templates: {exact} of {templates} learned exactly")
    tokenizer = chat_tokenizer()
    with contextlib.redirect_stdout(io.StringIO()):  # what the readers say of each kind is not what is measured here
        changed = silent_changes(_made(folder, "kinds"), tokenizer)
    say(f"kinds of files and rows: {len(CASES) - len(changed)} of {len(CASES)} as they have to be")
    for kind in changed:
        say(kind)
    seconds = start_seconds_cached(_made(folder, "start"), tokenizer, rows)
    say(f"a start on {rows:,} rows: {seconds['first']:.1f} s; the next one: {seconds['cached']:.2f} s")
    mib = rank_mib_per_million_rows(_made(folder, "stored"), stored)
    say(f"memory of a rank for a million stored examples: {mib:.1f} MiB")
    difference = packed_loss_difference()
    say(f"packed rows against examples one by one, {len(FAMILIES)} architectures: {difference:.1e} of the loss")
    return {
        "templates": templates,
        "templates_exact": exact,
        "silent_changes": len(changed),
        "start_seconds": seconds["first"],
        "start_seconds_cached": seconds["cached"],
        "rank_mib_per_million_rows": mib,
        "packed_loss_difference": difference,
    }


def _made(folder: Path, name: str) -> Path:
    (made := folder / name).mkdir()
    return made


if __name__ == "__main__":
    sys.exit(main())
