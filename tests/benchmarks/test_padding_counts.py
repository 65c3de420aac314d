"""What benchmarks/helpers/padding.py counts, against counting by hand."""

import pytest

from benchmarks.helpers.padding import epoch, grouped, shares


def test_shares_counted_by_hand():
    found = shares([10, 4, 8, 2], whole=4, micro=1, world=2)  # grouped: 10 beside 8, then 2 beside 4
    assert found["computed", "grouped"] == 0
    assert found["pass", "grouped"] == pytest.approx(1 - 24 / (2 * (10 + 4)))
    assert found["step", "grouped"] == 0  # 12 positions on each rank: they take turns at the longer one
    pairs = shares([10, 4, 8, 2], whole=4, micro=2, world=2)  # grouped: (10, 8) beside (4, 2); packed: 12 beside 12
    assert pairs["computed", "grouped"] == pytest.approx(1 - 24 / (20 + 8))
    assert pairs["pass", "grouped"] == pytest.approx(1 - 24 / 40)
    assert pairs["pass", "packed"] == 0
    assert pairs["pass", "levelled"] == pytest.approx(1 - 24 / 40)  # 10 beside (8, 4, 2) would be 48


def test_an_epoch_counted_by_hand():
    found = epoch([10, 4, 8, 2, 7], 4, lambda own: grouped(own, 2, 1))  # four of them, in an order of their own
    assert found.passes == 2
    assert found.computed == found.tokens
