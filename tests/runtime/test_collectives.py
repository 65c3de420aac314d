"""What ranks tell each other: plain JSON, on any number of them."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sorsa_ds.runtime import collectives
from tests.helpers.worlds import run_ranks

TOLD = [None, "é\ud800", {"a": [1, 2.5, float("inf")]}, (1, 2)]


def _tell():
    """Gather on this rank where nothing may be pickled; returns what was told, and the joined lists."""

    def refuse(*_):
        raise AssertionError("something is pickled")

    dist.distributed_c10d._object_to_tensor = refuse
    rank = collectives.rank()
    told = collectives.gather_json(TOLD[rank : rank + 2] * (1 + 99 * rank))
    try:
        collectives.agree(ValueError("of rank 1") if rank else None, torch.device("cpu"))
    except (ValueError, collectives.PeerError) as error:
        return told, collectives.gather_lists([rank] * rank), f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_every_rank_hears_all_of_them_in_their_order_and_nothing_is_pickled():
    expected = [[None, "é\ud800"], ["é\ud800", {"a": [1, 2.5, float("inf")]}] * 100]
    first, second = run_ranks(2, _tell)
    assert first[:2] == second[:2] == (expected, [1])
    assert first[2] == "PeerError: stopped because another rank failed: rank 1: ValueError: of rank 1"
    assert second[2] == "ValueError: of rank 1"


def test_the_package_sends_no_objects():
    """torch pickles what goes through its collectives for objects."""
    package = Path(collectives.__file__).parents[1]
    sending = [
        path
        for path in package.rglob("*.py")
        if re.search(r"(gather|broadcast|scatter)_object|pickle\.", path.read_text())
    ]
    assert sending == []


def test_a_world_of_one_hears_itself_as_the_others_would():
    assert collectives.gather_json(TOLD) == [[*TOLD[:-1], [1, 2]]]
    assert collectives.gather_lists(TOLD) == [*TOLD[:-1], [1, 2]]


def test_what_json_does_not_know_is_refused_in_a_world_of_one_too():
    with pytest.raises(TypeError):
        collectives.gather_json(object())
