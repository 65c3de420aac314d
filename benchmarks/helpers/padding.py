"""Positions that are computed although they hold no token, counted on real data; nothing is timed here.

Examples are tokenised and fall into the steps of an epoch as in a training run. Four ways to make micro-batches of a
step's examples are compared:

random    as they come
grouped   by length, as the product does where nothing else is asked for
levelled  neighbours by length too, but as many of them as fit into the positions that a micro-batch of the longest
          examples has, as the product does with `train.micro_batch_tokens=auto`: fewer passes than the others
packed    several examples in one row, in as many passes; the product does it with `data.packing`
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.helpers.common import say
from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.data import levelling
from sorsa_ds.data.layout import layout_of
from sorsa_ds.data.order import GlobalOrder, ShuffledPasses, share_of
from sorsa_ds.data.packing import balanced
from sorsa_ds.data.source import open_splits
from sorsa_ds.data.tokenize import Example, encode_all
from sorsa_ds.model.embedded import ensure_embedded_model

FILES = {"gsm8k": "gsm8k/train.jsonl", "alpaca": "alpaca/alpaca_en_demo.json"}
WAYS, KINDS = ("random", "grouped", "levelled", "packed"), ("computed", "pass", "step")
GLOBAL_BATCHES, MICRO_BATCHES, WORLDS = (8, 32, 128), (1, 2, 4, 8), (1, 8)

Batches = list[list[list[int]]]
"""The micro-batches of one step: for each forward pass the batch of every rank, as the lengths of its examples."""


def compare(a: argparse.Namespace) -> dict:
    """Print a table for each data set; returns shares of the largest global batch, by data set and batch sizes.

    These are the shares where ranks wait for one another in each pass, as under ZeRO-3.
    """
    result: dict[str, dict[str, float]] = {}
    for name, examples in data(a.data, a.examples).items():
        lengths = [len(example["input_ids"]) for example in examples]
        cuts = statistics.quantiles(lengths, n=20)
        say(f"{name}: {len(lengths)} examples of {min(lengths)} .. {max(lengths)} tokens, median "
            f"{statistics.median(lengths):.0f}, 5 to 95 %: {cuts[0]:.0f} .. {cuts[-1]:.0f}")  # fmt: skip
        say("  % of positions without a token: of those computed | and of those that pass while ranks wait for the "
            "longest, each pass (ZeRO-3) | each step (ZeRO-0 to 2)")  # fmt: skip
        say(f"  {'ranks':>5} {'global':>6} {'micro':>5}" + f" |{''.join(f'{way:>9}' for way in WAYS)}" * 3)
        for world in WORLDS:
            for whole in GLOBAL_BATCHES:
                for micro in (m for m in MICRO_BATCHES if whole % (world * m) == 0):
                    found = shares(lengths, whole, micro, world)
                    columns = ("".join(f"{100 * found[kind, way]:9.1f}" for way in WAYS) for kind in KINDS)
                    say(f"  {world:>5} {whole:>6} {micro:>5} |{' |'.join(columns)}")
                    if whole == GLOBAL_BATCHES[-1]:
                        result[f"{name}, {world} ranks, {micro} of {whole}"] = {
                            way: round(found["pass", way], 4) for way in WAYS
                        }
    return {"padding": result}


def data(folder: Path | None, limit: int | None) -> dict[str, list[Example]]:
    """Examples of each data set of FILES that lies in a folder, and of the embedded one, by name.

    They are tokenised for the default model. limit: most examples per data set.
    """
    tokenizer = AutoTokenizer.from_pretrained(ensure_embedded_model(lambda text: None))
    places = {name: str(folder / file) for name, file in FILES.items() if folder and (folder / file).is_file()}
    if missing := FILES.keys() - places.keys():
        say(f"left out, because --data names no folder with them: {', '.join(sorted(missing))}")
    found = {}
    for name, path in {**places, "word problems": EMBEDDED_DATA}.items():
        rows = open_splits(path, None, 0)["train"]
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        found[name] = encode_all(
            rows, layout_of(DataConfig(), rows.column_names), tokenizer, DataConfig().max_length, name
        ).examples
    return found


def shares(lengths: Sequence[int], whole: int, micro: int, world: int) -> dict[tuple[str, str], float]:
    """Shares of positions without a token, by kind and way.

    lengths: tokens of each example. whole: examples of a step. micro: examples of a micro-batch. world: ranks.
    """
    order, longest = GlobalOrder.of_run(ShuffledPasses(len(lengths), seed=0), whole), max(lengths)
    positions = {(kind, way): 0 for kind in KINDS for way in WAYS}
    for step in range(order.steps):
        places = range(step * whole, (step + 1) * whole)
        own = [lengths[index] for place in places if (index := order.index(place)) is not None]
        plans = {
            "random": _batches(order, step, micro, world, lengths, lambda index: 0),
            "grouped": _batches(order, step, micro, world, lengths, lengths.__getitem__),
            "levelled": _levelled(own, micro * longest, world),
            "packed": _side_by_side([[sum(own[i] for i in row)] for row in balanced(own, whole // micro)], world),
        }
        for way, plan in plans.items():
            passes = [[len(batch) * max(batch, default=0) or 1 for batch in at_once] for at_once in plan]
            positions["computed", way] += sum(map(sum, passes))
            positions["pass", way] += world * sum(map(max, passes))
            positions["step", way] += world * max(map(sum, zip(*passes, strict=True)))
    return {key: 1 - sum(lengths) / count for key, count in positions.items()}


def _batches(
    order: GlobalOrder, step: int, micro: int, world: int, lengths: Sequence[int], key: Callable[[int], int]
) -> Batches:
    """The micro-batches that the product makes of a step; a dummy example is one token long."""
    ranks = [order.micro_batches(step, rank, world, micro, key) for rank in range(world)]
    return [
        [[1 if index is None else lengths[index] for index in batch] for batch in at_once]
        for at_once in zip(*ranks, strict=True)
    ]


def _levelled(own: Sequence[int], most_positions: int, world: int) -> Batches:
    """The micro-batches that the product makes of a step's examples with `train.micro_batch_tokens`."""
    deal = levelling.levelled(own, world, most_positions)
    return [[[own[place] for place in batch] for batch in at_once] for at_once in deal]


def like_metamath(count: int) -> list[int]:
    """Lengths as MetaMathQA's in Alpaca's prompt: log-normal, about 215 tokens on average, cut at 512."""
    made = np.random.default_rng(0).lognormal(np.log(215) - 0.45**2 / 2, 0.45, count)
    return made.clip(40, 512).round().astype(int).tolist()


def imbalance(
    lengths: Sequence[int], world: int, global_batch: int, most_positions: int, *, each_pass: bool = True
) -> float:
    """By what share the slowest rank exceeds the mean of all, in positions, over an epoch in full steps.

    Args:
        lengths: tokens of each example, of at least one step.
        world: ranks.
        global_batch: examples of a step.
        most_positions: `train.micro_batch_tokens`.
        each_pass: whether ranks wait for one another in each forward pass, as under ZeRO-3; else once per step.
    """
    found = epoch(lengths, global_batch, lambda own: levelling.levelled(own, world, most_positions))
    return found.imbalance(each_pass)


def epoch(
    lengths: Sequence[int], global_batch: int, deal: Callable[[Sequence[int]], levelling.Deal]
) -> levelling.Positions:
    """The positions of an epoch's full steps.

    Args:
        lengths: tokens of each example, of at least one step.
        global_batch: examples of a step.
        deal: deals out a step's examples, by their lengths.
    """
    order = GlobalOrder(ShuffledPasses(len(lengths), seed=0), global_batch, len(lengths))
    steps = [
        [lengths[index] for index in order.of_step(step) if index is not None]
        for step in range(len(lengths) // global_batch)
    ]
    return levelling.Positions.of((deal(own), own) for own in steps)


def grouped(own: Sequence[int], world: int, micro: int) -> levelling.Deal:
    """The micro-batches of `micro` examples that the product makes of a step's examples where no positions are set."""
    ranks = [share_of(range(len(own)), rank, world, micro, own.__getitem__) for rank in range(world)]
    return [
        [[place for place in batch if place is not None] for batch in at_once] for at_once in zip(*ranks, strict=True)
    ]


def _side_by_side(batches: list[list[int]], world: int) -> Batches:
    """Let the ranks compute batches of about equally many positions at the same time, the largest first."""
    batches = sorted(batches, key=lambda batch: -len(batch) * max(batch, default=0))
    return [batches[first : first + world] for first in range(0, len(batches), world)]
