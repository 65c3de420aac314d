"""What benchmarks/helpers/padding.py counts, against trying everything and against counting by hand."""

from itertools import combinations, pairwise

import pytest

from benchmarks.helpers.padding import levelled, shares


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_levelled_batches_have_the_smallest_largest_of_all_cuts(count):
    lengths = [50, 7, 31, 30, 12, 4, 44, 9]
    falling = sorted(lengths, reverse=True)

    def largest(cuts):
        edges = [0, *cuts, len(falling)]
        return max((b - a) * falling[a] for a, b in pairwise(edges))

    best = min(largest(cuts) for n in range(count) for cuts in combinations(range(1, len(falling)), n))
    batches = levelled(lengths, count)
    assert len(batches) == count
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    assert max(len(batch) * max(batch, default=0) for batch in batches) == best


def test_shares_counted_by_hand():
    found = shares([10, 4, 8, 2], whole=4, micro=1, world=2)  # grouped: 10 beside 8, then 2 beside 4
    assert found["computed", "grouped"] == 0
    assert found["pass", "grouped"] == pytest.approx(1 - 24 / (2 * (10 + 4)))
    assert found["step", "grouped"] == 0  # 12 positions on each rank: they take turns at the longer one
    pairs = shares([10, 4, 8, 2], whole=4, micro=2, world=2)  # grouped: (10, 8) beside (4, 2); packed: 12 beside 12
    assert pairs["computed", "grouped"] == pytest.approx(1 - 24 / (20 + 8))
    assert pairs["pass", "grouped"] == pytest.approx(1 - 24 / 40)
    assert pairs["pass", "packed"] == 0
