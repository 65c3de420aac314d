"""The account of a run's evaluations, by hand."""

import pytest

from sorsa_ds.run.best import BestSoFar


def account(losses, min_delta=0.0):
    """The account after evaluations every ten steps."""
    found = BestSoFar()
    for number, loss in enumerate(losses, start=1):
        found = found.after(10 * number, loss, min_delta)
    return found


@pytest.mark.parametrize(
    ("losses", "min_delta", "best", "waited"),
    [
        ([3.0], 0.0, (10, 3.0), 0),
        ([3.0, 2.0, 2.5, 2.2], 0.0, (20, 2.0), 2),
        ([3.0, 3.0, 3.0], 0.0, (10, 3.0), 2),
        ([3.0, 2.9, 2.85], 0.2, (30, 2.85), 2),  # each is the lowest, and none is lower by enough
        ([3.0, 2.9, 2.79, 2.7], 0.2, (40, 2.7), 1),  # 2.79 is 0.21 below 3.0, 2.7 is not 0.2 below 2.79
        ([2.0, 3.0, 1.0], 0.0, (30, 1.0), 0),
    ],
)
def test_the_lowest_loss_and_the_vain_evaluations_are_counted(losses, min_delta, best, waited):
    found = account(losses, min_delta)
    assert (found.step, found.loss) == best
    assert found.waited == waited


def test_an_evaluation_that_is_made_again_does_not_count_twice():
    found = account([3.0, 4.0])
    assert found.after(20, 4.1, 0.0) == found
    assert found.after(10, 1.0, 0.0) == found
    assert found.after(30, 4.0, 0.0).waited == 2
