"""The order of examples over ranks, steps and epochs, and the batches made of them."""

import numpy as np
import pytest
import torch

from sorsa_ds.data.batches import BatchPlan, collate, eval_batches, pad_token_id
from sorsa_ds.data.order import GlobalOrder, ShuffledPasses
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED
from tests.helpers.chat_tokenizer import chat_tokenizer

PAD = 999
GLOBAL_BATCH = 12
SHAPES = [(1, 1), (1, 12), (2, 3), (3, 2), (3, 4), (4, 1), (4, 3)]  # ranks, micro-batch


def example(number: int, length: int = 0) -> dict[str, np.ndarray]:
    """An example whose tokens all are `number`, the first one masked."""
    ids = np.full(length or 2 + number % 5, number, dtype=np.int32)
    return {"input_ids": ids, "labels": np.where(np.arange(len(ids)) > 0, ids, IGNORED).astype(np.int32)}


def step_indices(order: GlobalOrder, step: int, world: int, micro_batch: int) -> list[int | None]:
    """All indices of a step, over its ranks and micro-batches."""
    per_rank = [order.micro_batches(step, rank, world, micro_batch) for rank in range(world)]
    assert {len(batches) for batches in per_rank} == {order.global_batch // (world * micro_batch)}
    batches = [batch for rank in per_rank for batch in rank]
    assert {len(batch) for batch in batches} == {micro_batch}
    return [index for batch in batches for index in batch]


def test_every_epoch_takes_each_example_once_in_another_order():
    order = GlobalOrder(ShuffledPasses(50, seed=3), global_batch=7, positions=150)
    epochs = [[order.index(position) for position in range(50 * epoch, 50 * (epoch + 1))] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(50))]}) == 4


@pytest.mark.parametrize(("world", "micro_batch"), SHAPES)
def test_a_steps_examples_do_not_depend_on_the_ranks(world, micro_batch):
    order = GlobalOrder.of_run(ShuffledPasses(50, seed=1), GLOBAL_BATCH, epochs=2)
    stream = [order.index(position) for position in range(order.steps * GLOBAL_BATCH)]
    assert order.steps == 9
    for step in range(order.steps):
        expected = stream[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        assert sorted(map(str, step_indices(order, step, world, micro_batch))) == sorted(map(str, expected))


@pytest.mark.parametrize(("world", "micro_batch"), SHAPES)
def test_a_run_of_two_epochs_neither_repeats_nor_skips(world, micro_batch):
    order = GlobalOrder.of_run(ShuffledPasses(50, seed=1), GLOBAL_BATCH, epochs=2)
    taken = [index for step in range(order.steps) for index in step_indices(order, step, world, micro_batch)]
    assert sorted(index for index in taken if index is not None) == sorted([*range(50), *range(50)])
    assert taken.count(None) == 9 * GLOBAL_BATCH - 100
    assert None not in taken[: 8 * GLOBAL_BATCH]


def test_each_example_of_a_micro_batch_goes_to_one_rank():
    order = GlobalOrder.of_run(ShuffledPasses(24, seed=0), 24)
    ranks = [{index for batch in order.micro_batches(0, rank, 3, 2) for index in batch} for rank in range(3)]
    assert [len(rank) for rank in ranks] == [8, 8, 8]
    assert set.union(*ranks) == set(range(24))


@pytest.mark.parametrize(("world", "micro_batch"), SHAPES)
def test_examples_of_similar_length_share_a_row_of_micro_batches_the_longest_first(world, micro_batch):
    order = GlobalOrder.of_run(ShuffledPasses(50, seed=1), GLOBAL_BATCH, epochs=1)
    for step in range(order.steps):
        per_rank = [
            order.micro_batches(step, rank, world, micro_batch, lambda index: index % 7) for rank in range(world)
        ]
        rows = [
            [index for rank in (row[::-1] if number % 2 else row) for index in rank]
            for number, row in enumerate(zip(*per_rank, strict=True))
        ]
        lengths = [-1 if index is None else index % 7 for row in rows for index in row]
        assert lengths == sorted(lengths, reverse=True)
        stream = [order.index(position) for position in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)]
        assert sorted(map(str, stream)) == sorted(str(index) for row in rows for index in row)


def test_ranks_take_turns_at_the_longest_so_that_none_has_more_of_a_step():
    order = GlobalOrder.of_run(ShuffledPasses(64, seed=1), 64)
    ranks = [order.micro_batches(0, rank, 4, 2, lambda index: index) for rank in range(4)]
    taken = [sum(index for batch in rank for index in batch) for rank in ranks]
    assert taken == [sum(range(64)) // 4] * 4
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(64))


def test_a_plan_pads_no_more_than_the_lengths_of_neighbours_differ():
    examples = [example(number, 2 + number * number % 53) for number in range(1, 65)]
    plan = BatchPlan(
        Examples.of(examples), micro_batch_size=4, accumulation=16, rank=0, world_size=1, seed=0, pad_token_id=PAD
    )  # fmt: skip
    batches = plan.micro_batches(0)
    lengths = sorted((len(one["input_ids"]) for one in examples), reverse=True)
    assert [batch["input_ids"].shape[1] for batch in batches] == lengths[::4]


def test_steps_go_on_over_epochs_with_full_batches():
    order = GlobalOrder.of_run(ShuffledPasses(5, seed=0), 4, steps=10)
    assert order.steps == 10
    assert [order.index(position) for position in range(40)].count(None) == 0


@pytest.mark.parametrize(("epochs", "positions", "steps"), [(1, 10, 3), (0.5, 5, 2), (1.6, 16, 4), (1e-6, 1, 1)])
def test_epochs_need_not_be_whole(epochs, positions, steps):
    order = GlobalOrder.of_run(ShuffledPasses(10, seed=0), 4, epochs=epochs)
    assert (order.positions, order.steps) == (positions, steps)


def test_the_seed_decides_the_order():
    def stream(seed):
        return [GlobalOrder.of_run(ShuffledPasses(40, seed), 8).index(position) for position in range(40)]

    assert stream(1) == stream(1)
    assert stream(1) != stream(2)


def test_collate_pads_right_and_masks_by_length():
    batch = collate([example(7, 2), example(PAD, 4)], PAD)
    assert batch["input_ids"].tolist() == [[7, 7, PAD, PAD], [PAD] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 7, IGNORED, IGNORED], [IGNORED, PAD, PAD, PAD]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_dummy_has_one_token_and_teaches_nothing():
    batch = collate([None, None], PAD)
    assert {key: tensor.tolist() for key, tensor in batch.items()} == {
        "input_ids": [[PAD], [PAD]],
        "attention_mask": [[1], [1]],
        "labels": [[IGNORED], [IGNORED]],
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_plan_learns_each_example_once_an_epoch(world):
    examples = [example(number) for number in range(1, 11)]
    learned, accumulation = [], 2
    for rank in range(world):
        plan = BatchPlan(
            Examples.of(examples),
            micro_batch_size=2,
            accumulation=accumulation,
            rank=rank,
            world_size=world,
            seed=0,
            pad_token_id=PAD,
        )
        assert plan.steps == -(-10 // (4 * world))
        for step in range(plan.steps):
            batches = plan.micro_batches(step)
            assert [len(batch["labels"]) for batch in batches] == [2, 2]
            learned += [int(row.max()) for batch in batches for row in batch["labels"] if row.max() != IGNORED]
    assert sorted(learned) == list(range(1, 11))


def test_a_plan_gives_a_step_the_same_batches_whenever_it_is_asked():
    plan = BatchPlan(
        Examples.of([example(number) for number in range(1, 20)]),
        micro_batch_size=2,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=0,
        pad_token_id=PAD,
        steps=30,
    )
    first = plan.micro_batches(17)
    plan.micro_batches(3)
    assert torch.equal(plan.micro_batches(17)[0]["input_ids"], first[0]["input_ids"])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 8, 11])
def test_held_out_batches_are_as_many_on_every_rank(world, count):
    examples = [example(number) for number in range(1, count + 1)]
    ranks = [list(eval_batches(Examples.of(examples), rank, world, 2, PAD)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-count // (2 * world))}
    rows = [row for batches in ranks for batch in batches for row in batch["labels"]]
    assert sorted(int(row.max()) for row in rows if row.max() != IGNORED) == list(range(1, count + 1))


def test_any_id_will_do_for_padding():
    tokenizer = chat_tokenizer()
    assert pad_token_id(tokenizer, 357) == tokenizer.eos_token_id
    tokenizer.unk_token = "<|endoftext|>"
    assert pad_token_id(tokenizer, 357) == tokenizer.unk_token_id == 0
    tokenizer.pad_token = "<|im_start|>"
    assert pad_token_id(tokenizer, 357) == tokenizer.pad_token_id == 1
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == 357
    assert pad_token_id(tokenizer, 357) == tokenizer.unk_token_id
    assert pad_token_id(tokenizer, 358) == tokenizer.pad_token_id
    for name in ("pad_token", "unk_token", "eos_token"):
        setattr(tokenizer, name, None)
    assert pad_token_id(tokenizer, 357) == 0
