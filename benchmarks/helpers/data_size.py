"""What a start costs whose rows are tokenised already, and how a rank's memory grows with the number of rows.

Start it as a program with a folder of stored examples, and it prints the bytes that a rank takes for them.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.batches import BatchPlan
from sorsa_ds.data.examples import load_examples
from sorsa_ds.data.token_store import opened, store
from sorsa_ds.data.tokenize import IGNORED, ROWS_PER_CALL, Encoded
from sorsa_ds.data.word_problems import word_problems

TOKENS = 200
"""Tokens of an example, about as many as a worked word problem has."""

_STEPS, _GLOBAL_BATCH = 300, 32


def start_seconds_cached(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int = 20_000) -> dict[str, float]:
    """Seconds for reading rows and their examples, the first time and the second: `first` and `cached`.

    Args:
        folder: takes the file of rows and the cache.
        rows: word problems in the file.
    """
    problems = word_problems(0, 200).to_list()
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = problems[number % len(problems)]
            told = {"question": f"{number}: {row['question']}", "answer": row["answer"]}
            file.write(json.dumps(told) + "\n")
    seconds = {}
    with patch.dict(os.environ, SORSA_CACHE=str(folder / "cache")):
        for which in ("first", "cached"):
            began = time.perf_counter()
            examples, _ = load_examples(DataConfig(path=str(folder / "rows.jsonl")), tokenizer, 0)
            seconds[which] = time.perf_counter() - began
            assert examples.counts.rows == rows - DataConfig().eval_size
    return seconds


def rank_mib_per_million_rows(folder: Path, rows: int = 1_000_000) -> float:
    """MiB of memory that a rank takes for a million examples more, batches and their order included.

    A process of its own opens the examples and takes batches from all over them; another one does so with a hundredth
    as many, and the difference is told.

    Args:
        folder: takes the examples, 1600 bytes each.
    """
    taken = {}
    for count in (rows // 100, rows):
        place = folder / str(count)
        place.mkdir()
        store(place, _made_up(count), "made up")
        told = subprocess.run([sys.executable, "-m", __name__, place], check=True, capture_output=True, text=True)
        taken[count] = int(told.stdout)
    return (taken[rows] - taken[rows // 100]) / 2**20 / (rows - rows // 100) * 1e6


def _made_up(rows: int) -> Iterator[Encoded]:
    """Examples of random tokens, half of them learned, as if rows had become them."""
    drawn = np.random.default_rng(0)
    for _ in range(rows // ROWS_PER_CALL):
        ids = drawn.integers(0, 32_000, (ROWS_PER_CALL, TOKENS), dtype=np.int32)
        labels = np.where(np.arange(TOKENS) < TOKENS // 2, np.int32(IGNORED), ids)
        examples = [{"input_ids": one, "labels": other} for one, other in zip(ids, labels, strict=True)]
        yield Encoded(examples, Counter(), 0, Counter())


def _take_batches(folder: Path) -> int:
    """Open stored examples and take steps of a run on them; returns how much memory that took, in bytes."""
    process = psutil.Process()
    before = process.memory_info().rss
    plan = BatchPlan(
        opened(folder, "made up"), micro_batch_size=4, accumulation=_GLOBAL_BATCH // 4, rank=0, world_size=1, seed=0,
        pad_token_id=0,
    )  # fmt: skip
    for step in np.linspace(0, plan.steps - 1, _STEPS, dtype=int):
        plan.micro_batches(int(step))
    return process.memory_info().rss - before


if __name__ == "__main__":
    print(_take_batches(Path(sys.argv[1])))
