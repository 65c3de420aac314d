"""Micro-batches of as many positions: against trying everything, against counting by hand, and how well they level."""

import time
from itertools import combinations, pairwise

import numpy as np
import pytest

from benchmarks.helpers.padding import epoch, grouped, imbalance, like_metamath
from sorsa_ds.data.batches import BatchPlan
from sorsa_ds.data.levelling import Positions, levelled, positions
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED, Example
from sorsa_ds.data.word_problems import word_problems

PAD = 999


def waited(lengths, world: int, sizes) -> int:
    """Positions that pass in a step, from the sizes of micro-batches of falling neighbours; counted on its own."""
    falling = sorted(lengths, reverse=True)
    edges = np.cumsum([0, *sizes])
    areas = sorted(((b - a) * falling[a] for a, b in pairwise(edges)), reverse=True)
    return sum(areas[::world])


def largest_of_passes(deal, lengths) -> int:
    return sum(max(positions(batch, lengths) for batch in at_once) for at_once in deal)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [100, 130, 500, 10**6])
def test_every_example_has_one_place_in_as_many_passes_on_every_rank(world, limit):
    generator = np.random.default_rng(world)
    for count in (1, 2, world, 24, 120):
        for lengths in (
            generator.integers(1, 101, count).tolist(),
            [100] * count,
            [1] * count,
            [100] + [1] * (count - 1),
        ):
            deal = levelled(lengths, world, limit)
            assert {len(at_once) for at_once in deal} == {world}
            assert sorted(place for at_once in deal for batch in at_once for place in batch) == list(range(count))
            assert all(len(batch) * max(lengths[i] for i in batch) <= limit for row in deal for batch in row if batch)
            empty = sum(not batch for at_once in deal for batch in at_once)
            assert empty == max(0, world * len(deal) - count)
            assert len(deal) <= -(-count // (world * (limit // 100)))  # as many as without levelling, at most
            assert deal == levelled(lengths, world, limit)


def test_an_example_that_is_longer_than_the_limit_is_alone():
    deal = levelled([90, 5, 5, 5, 5, 5], 2, 20)
    assert [0] in [batch for at_once in deal for batch in at_once]


def test_passes_are_as_few_as_hold_the_examples():
    assert len(levelled([50] * 16, 2, 200)) == 2
    assert len(levelled([50] * 17, 2, 200)) == 3
    assert len(levelled([51] * 16, 2, 200)) == 3
    assert len(levelled([60, 40] * 8, 4, 10**6)) == 1


@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_pass_is_the_best_of_all_cuts(world):
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(5, 100, 11).tolist()
        best = min(
            waited(lengths, world, np.diff([0, *cuts, len(lengths)]))
            for cuts in combinations(range(1, len(lengths)), world - 1)
        )
        assert largest_of_passes(levelled(lengths, world, 10**6), lengths) == best


def test_several_passes_are_close_to_the_best_of_all_cuts():
    """Every way to cut 14 falling lengths for two passes of three ranks is tried, 1,287 of them for each step."""
    found = best = 0
    for seed in range(40):
        lengths = np.random.default_rng(seed).integers(20, 100, 14).tolist()
        limit = sum(lengths) // 4
        deal = levelled(lengths, 3, limit)
        if len(deal) != 2:
            continue
        falling = sorted(lengths, reverse=True)
        found += largest_of_passes(deal, lengths)
        best += min(
            waited(lengths, 3, sizes)
            for cuts in combinations(range(1, 14), 5)
            for edges, sizes in [((0, *cuts), np.diff([0, *cuts, 14]))]
            if all(size * falling[edge] <= limit for edge, size in zip(edges, sizes, strict=True))
        )
    assert best > 0
    assert best <= found <= 1.02 * best


def test_positions_are_counted_by_hand():
    lengths = [10, 9, 5, 4, 4]
    counted = Positions.of([([[[0], [1]], [[2, 3], []]], lengths[:4]), ([[[4], []]], lengths)])
    assert counted == Positions(
        tokens=28 + 32, computed=10 + 9 + 10 + 1 + 4 + 1, of_passes=2 * (10 + 10 + 4), of_steps=2 * (20 + 4),
        largest=10, passes=3,
    )  # fmt: skip
    assert counted.imbalance() == pytest.approx(48 / 35 - 1)


def test_ranks_wait_for_a_third_of_what_they_waited_for_on_lengths_as_metamaths():
    """8 ranks, 128 examples per step, 2 x 512 positions: by what share the slowest rank exceeds the mean."""
    lengths = like_metamath(4096)
    now = epoch(lengths, 128, lambda own: levelled(own, 8, 1024))
    before = epoch(lengths, 128, lambda own: grouped(own, 8, 2))
    assert before.tokens == now.tokens
    assert before.imbalance() > 0.11
    assert now.imbalance() < 0.036
    assert before.imbalance(each_pass=False) > 0.035
    assert now.imbalance(each_pass=False) < 0.01
    assert now.padding < 0.025
    assert now.passes < 0.6 * before.passes
    assert imbalance(lengths, 8, 128, 1024) == now.imbalance()
    assert imbalance(lengths, 8, 128, 1024, each_pass=False) == now.imbalance(each_pass=False)


def test_a_step_is_dealt_out_in_a_moment():
    """In processor time, which is spent while the step before it is computed: about 8 ms for 128 examples."""
    lengths = like_metamath(128 * 20)
    began = time.process_time()
    for first in range(0, len(lengths), 128):
        levelled(lengths[first : first + 128], 8, 1024)
    assert time.process_time() - began < 20 * 0.1
    began = time.process_time()
    levelled(like_metamath(8192), 64, 1024)
    assert time.process_time() - began < 2


def plans(examples, world: int, tokens: int | None, **settings) -> list[BatchPlan]:
    return [
        BatchPlan(
            Examples.of(examples), micro_batch_size=2, accumulation=4, rank=rank, world_size=world, seed=0,
            pad_token_id=PAD, micro_batch_tokens=tokens, **settings,
        )
        for rank in range(world)
    ]  # fmt: skip


def learned(batches) -> list[int]:
    return sorted(int(row.max()) for batch in batches for row in batch["labels"] if row.max() != IGNORED)


def numbered(lengths) -> list[Example]:
    return [
        {"input_ids": (ids := np.full(length, number, dtype=np.int32)), "labels": ids.copy()}
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_plans_steps_learn_the_same_examples_as_without(world):
    examples = numbered(np.random.default_rng(1).integers(2, 60, 50))
    ours, theirs = plans(examples, world, 120, epochs=2.0), plans(examples, world, None, epochs=2.0)
    assert ours[0].steps == theirs[0].steps > 3
    for step in range(ours[0].steps):
        ranks = [plan.micro_batches(step) for plan in ours]
        assert len({len(batches) for batches in ranks}) == 1
        assert len(ranks[0]) <= 4
        assert all(batch["input_ids"].numel() <= 120 for batches in ranks for batch in batches)
        before = [batch for plan in theirs for batch in plan.micro_batches(step)]
        assert learned(batch for batches in ranks for batch in batches) == learned(before)


def test_a_step_has_the_same_batches_whenever_it_is_asked_for():
    (plan,) = plans(numbered([1 + 7 * number % 40 for number in range(30)]), 1, 90, steps=9)
    first = plan.micro_batches(5)
    plan.micro_batches(8)
    again = plan.micro_batches(5)
    assert all(bool((a[key] == b[key]).all()) for a, b in zip(first, again, strict=True) for key in a)


def test_less_passes_while_ranks_wait_on_real_texts():
    lengths = [len(f"{row['question']} {row['answer']}".split()) for row in word_problems(0, 1280)]
    longest = max(lengths)
    now = epoch(lengths, 128, lambda own: levelled(own, 8, 2 * longest))
    before = epoch(lengths, 128, lambda own: grouped(own, 8, 2))
    assert now.of_passes < 0.97 * before.of_passes
    assert now.of_steps < before.of_steps
    assert now.passes < before.passes
