"""A micro-batch made ready on the CPU, against its definition, and that nothing is asked of the device after that."""

import pytest
import torch
from transformers import AutoModelForCausalLM, masking_utils, modeling_flash_attention_utils

from benchmarks.helpers.host_syncs import HostSyncs
from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.model.packed_attention import known_rows
from sorsa_ds.train.loss import LossOptions, training_losses
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.padding import Padding
from tests.helpers.architectures import CONFIGS


def collated(*learned: list[int], lengths: tuple[int, ...] = (9, 6, 9)) -> dict[str, torch.Tensor]:
    """A sequence for each list of learned positions, 9 places long and padded on the right."""
    ids = torch.randint(3, 64, (len(learned), 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED)
    for row, places in enumerate(learned):
        labels[row, places] = ids[row, places]
    mask = torch.stack([(torch.arange(9) < length).long() for length in lengths[: len(learned)]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    "learned", [([3, 4, 8], [2, 5], [0, 1]), ([], [0], []), ([0, 1, 2, 3, 4, 5, 6, 7, 8], [], []), ([7],)]
)
def test_counts_and_places_are_those_of_a_walk_over_the_labels(learned):
    batch = collated(*learned)
    ready = MicroBatch.of(batch)
    walked = [
        (row, at - 1, batch["labels"][row, at].item()) for row, places in enumerate(learned) for at in places if at
    ]
    positions = sorted({at for _, at, _ in walked})
    assert (ready.learned, ready.tokens) == (len(walked), sum((9, 6, 9)[: len(learned)]))
    assert ready.positions.tolist() == positions
    assert ready.labels.tolist() == [token for _, _, token in walked]
    assert ready.places.tolist() == [row * len(positions) + positions.index(at) for row, at, _ in walked]
    assert ready.places_of_all.tolist() == [row * 9 + at for row, at, _ in walked]
    assert MicroBatch.of(ready) is ready


def test_squares_are_those_of_each_example_in_padded_and_packed_rows():
    batch = collated([3, 4, 8], [2, 5])
    assert MicroBatch.of(batch).squares == 9**2 + 6**2
    assert MicroBatch.of(batch | PACKED).squares == 4**2 + 5**2 + 6**2


@pytest.mark.parametrize(
    ("mask", "right"), [([1, 1, 0], True), ([1, 1, 1], True), ([0, 1, 1], False), ([1, 0, 1], False)]
)
def test_padding_before_a_token_is_no_right_padding(mask, right):
    ids = torch.ones(2, 3, dtype=torch.int64)
    masks = torch.tensor([[1, 1, 1], mask])
    assert MicroBatch.of({"input_ids": ids, "attention_mask": masks, "labels": ids}).padded_right is right


def test_a_copy_has_the_same_numbers_on_the_other_device():
    ready = MicroBatch.of(collated([3, 4], [2]))
    moved = ready.to(torch.device("meta"), non_blocking=True)
    assert (moved.learned, moved.tokens, moved.padded_right, moved.position_ids) == (3, 15, True, None)
    for name in ("input_ids", "attention_mask", "labels", "positions", "places", "places_of_all"):
        assert getattr(moved, name).is_meta and getattr(moved, name).shape == getattr(ready, name).shape


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0, 0]])}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "qwen3", "phi3", "gpt2"])
@pytest.mark.parametrize("more", [{}, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_no_pass_over_a_micro_batch_waits_for_the_device(name, more, chunk):
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    ready = MicroBatch.of(collated([3, 4, 8], [2, 5]) | more)
    with HostSyncs() as syncs:
        loss, balance = training_losses(model, ready, LossOptions(Padding.POSITIONS, chunk))
        loss.backward()
    assert balance is None and syncs.counts == {}


def test_what_waits_for_the_device_is_counted():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    batch = collated([3, 4, 8], [2, 5])
    with HostSyncs() as syncs:
        learned = batch["labels"] != IGNORED
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[learned].sum().item()
        learned.any(0).nonzero().tolist()
    # transformers looks at the mask twice, and at positions not at all when it has one
    wanted = {"aten._local_scalar_dense": 3, "aten.index": 1, "aten.nonzero": 1, "Tensor.tolist": 1}
    assert syncs.counts == wanted


@pytest.mark.parametrize("packed", [False, True])
def test_transformers_does_not_look_itself_whether_rows_are_packed(packed):
    """Flash attention would, in every layer, for which a GPU is waited for."""
    looks = modeling_flash_attention_utils._is_packed_sequence
    restarting = torch.tensor([[0, 1, 2, 0, 1]])
    with known_rows(packed):
        looked = modeling_flash_attention_utils._is_packed_sequence(restarting, 1)
        rows = masking_utils.find_packed_sequence_indices(restarting)
    assert (bool(looked), rows is not None) == (packed, packed)
    assert modeling_flash_attention_utils._is_packed_sequence is looks
