"""The learning rate that follows from a spectrum, against the step that it is meant to make."""

import math

import pytest

from sorsa_ds.sorsa.step_size import STEP, suggested_rate


def test_one_layer_moves_by_the_step():
    assert suggested_rate([(2.0, 16)]) == pytest.approx(STEP / (2.0 * 4), rel=0.05)


def test_the_rate_falls_with_the_root_of_the_layers_and_the_mean_is_of_logarithms():
    four = [(1.0, 4), (4.0, 4), (1.0, 4), (4.0, 4)]
    assert suggested_rate(four) == pytest.approx(STEP / (2.0 * 2 * math.sqrt(4)), rel=0.05)


def test_layers_of_zeros_have_no_say_and_alone_no_rate():
    assert suggested_rate([(0.0, 4), (1.0, 4)]) == pytest.approx(STEP / (2 * math.sqrt(2)), rel=0.05)
    with pytest.raises(ValueError, match="train.learning_rate=auto follows from singular values, and all .* are 0"):
        suggested_rate([(0.0, 4)])
