"""Which examples share a packed row, and what a row is made of."""

import time
from itertools import product

import numpy as np
import pytest

from sorsa_ds.data.batches import BatchPlan
from sorsa_ds.data.packing import Packing, balanced, collate_packed, packed_rows
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED, Example
from sorsa_ds.data.word_problems import word_problems

PAD = 999


def example(number: int, length: int) -> Example:
    """An example whose tokens all are `number`, and all are labelled, even the first."""
    ids = np.full(length, number, dtype=np.int32)
    return {"input_ids": ids, "labels": ids.copy()}


def plans(examples, packing: Packing | None, world=1, micro=2, accumulation=4, **settings) -> list[BatchPlan]:
    """The plan of each rank."""
    return [
        BatchPlan(
            Examples.of(examples), micro_batch_size=micro, accumulation=accumulation, rank=rank, world_size=world,
            seed=0, pad_token_id=PAD, packing=packing, **settings,
        )
        for rank in range(world)
    ]  # fmt: skip


def places(batches: list) -> tuple[int, int]:
    """Places that are computed in some batches, and those of them that hold a token."""
    return sum(one["input_ids"].numel() for one in batches), sum(int(one["attention_mask"].sum()) for one in batches)


def test_a_batch_has_its_rows_examples_one_after_the_other():
    batch = collate_packed([[example(7, 3), example(8, 2)], [example(9, 4)], []], PAD)
    assert {key: tensor.tolist() for key, tensor in batch.items()} == {
        "input_ids": [[7, 7, 7, 8, 8], [9, 9, 9, 9, PAD], [PAD] * 5],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0] * 5],
        "labels": [[IGNORED, 7, 7, IGNORED, 8], [IGNORED, 9, 9, 9, IGNORED], [IGNORED] * 5],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0], [0] * 5],
    }


def test_a_rank_without_examples_has_one_place_of_which_nothing_is_learned():
    batch = collate_packed([[], []], PAD)
    assert [tensor.shape for tensor in batch.values()] == [(2, 1)] * 4
    assert batch["labels"].tolist() == [[IGNORED]] * 2


def test_rows_hold_every_example_once_and_are_nearly_equal():
    lengths = [50, 7, 31, 31, 12, 4, 44, 9]
    rows = balanced(lengths, 3)
    assert sorted(place for row in rows for place in row) == list(range(8))
    sums = [sum(lengths[place] for place in row) for row in rows]
    assert max(sums) - min(sums) <= min(lengths) * 2


@pytest.mark.parametrize(("world", "micro", "joined"), product((1, 2, 3), (1, 2, 4), (False, True)))
def test_rows_fit_and_never_take_more_passes_than_padding_does(world, micro, joined):
    """Whatever the lengths: all as long as can be, all short, and mixed."""
    packing, accumulation = Packing.of(micro, 100, joined), 4
    count = world * micro * accumulation
    generator = np.random.default_rng(0)
    mixed = [generator.integers(1, 101, count).tolist() for _ in range(50)]
    for lengths in (
        [100] * count,
        [1] * count,
        [51] * count,
        [100] * (count - 1) + [1],
        [60, 40] * (count // 2),
        *mixed,
    ):
        rows = packed_rows(lengths, packing, world, accumulation)
        sums = [sum(lengths[place] for place in row) for row in rows]
        assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
        assert sums == sorted(sums, reverse=True)
        assert sums[0] <= packing.length
        passes, rest = divmod(len(rows), world * packing.rows)
        assert rest == 0
        assert passes <= accumulation


def test_a_step_takes_as_few_passes_as_hold_it():
    assert len(packed_rows([25] * 16, Packing(rows=2, length=100), 2, 4)) == 4  # one pass of two ranks
    assert len(packed_rows([25] * 17, Packing(rows=2, length=100), 2, 5)) == 8
    assert len(packed_rows([60] * 4, Packing(rows=1, length=100), 1, 9)) == 4  # 240 tokens would fit into three rows
    assert len(packed_rows([60] * 8, Packing(rows=1, length=100), 1, 9)) == 8


def test_a_large_step_is_planned_in_a_moment():
    """Examples of which no two share a row: half of all numbers of passes are too few."""
    began = time.process_time()
    assert len(packed_rows([51] * 8192, Packing(rows=1, length=100), 8, 1024)) == 8192
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("world", "micro", "joined"), product((1, 2, 3), (1, 2), (False, True)))
def test_each_step_learns_the_same_examples_as_without_packing_in_as_many_passes_on_every_rank(world, micro, joined):
    lengths = np.random.default_rng(1).integers(1, 60, 50)
    examples = [example(number, length) for number, length in enumerate(lengths)]

    def learned(batches) -> list[int]:
        return sorted(int(token) for batch in batches for token in batch["input_ids"][batch["attention_mask"] == 1])

    packed = plans(examples, Packing.of(micro, 60, joined), world, micro, epochs=2.0)
    padded = plans(examples, None, world, micro, epochs=2.0)
    assert packed[0].steps == padded[0].steps > 3
    for step in range(packed[0].steps):
        ranks = [plan.micro_batches(step) for plan in packed]
        assert len({len(batches) for batches in ranks}) == 1
        assert len(ranks[0]) <= 4
        shapes = [batch["input_ids"].shape for batches in ranks for batch in batches]
        assert all(rows == (1 if joined else micro) and length <= 60 * micro for rows, length in shapes)
        unpacked = [batch for plan in padded for batch in plan.micro_batches(step)]
        dummies = sum(int((batch["input_ids"][batch["attention_mask"] == 1] == PAD).sum()) for batch in unpacked)
        assert learned(batch for batches in ranks for batch in batches) + [PAD] * dummies == learned(unpacked)


def test_a_steps_rows_are_the_same_whenever_they_are_asked_for():
    examples = [example(number, 1 + number % 9) for number in range(30)]
    (plan,) = plans(examples, Packing(2, 20), steps=9)
    first = plan.micro_batches(5)
    plan.micro_batches(2)
    again = plan.micro_batches(5)
    assert all(bool((a[key] == b[key]).all()) for a, b in zip(first, again, strict=True) for key in a)


def test_padded_places_are_counted_by_hand():
    lengths = (40, 30, 20, 10, 10, 8, 6, 4)
    examples = [example(number, length) for number, length in enumerate(lengths)]
    ((padded,), (packed,), (joined,)) = (
        plans(examples, packing, accumulation=4) for packing in (None, Packing(2, 64), Packing(1, 128))
    )
    assert places(padded.micro_batches(0)) == (2 * (40 + 20 + 10 + 6), 128)
    assert places(packed.micro_batches(0)) == (2 * 64, 128)  # 40 10 8 6 beside 30 20 10 4
    assert places(joined.micro_batches(0)) == (128, 128)
    assert [len(plan.micro_batches(0)) for plan in (padded, packed, joined)] == [4, 1, 1]


def test_less_is_padded_on_real_texts():
    """An epoch of generated word problems on two ranks, with a token for each word. Places are counted, not timed."""
    lengths = [len(f"{row['question']} {row['answer']}".split()) for row in word_problems(0, 250)]
    examples = [example(number, length) for number, length in enumerate(lengths)]
    padded, passes = {}, {}
    for way, packing in {"padded": None, "packed": Packing(4, 256), "joined": Packing(1, 1024)}.items():
        ranks = plans(examples, packing, world=2, micro=4, accumulation=16)
        batches = [batch for plan in ranks for step in range(plan.steps) for batch in plan.micro_batches(step)]
        computed, held = places(batches)
        padded[way], passes[way] = computed - held, len(batches)
        assert held == sum(lengths) + (6 if packing is None else 0)  # dummies fill the last step: 250 of 256
    assert padded["joined"] == 0
    assert 2 * padded["packed"] < padded["padded"]
    assert passes["joined"] <= passes["packed"] < passes["padded"] / 2
