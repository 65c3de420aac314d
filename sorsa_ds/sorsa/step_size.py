"""How large a learning rate should be, from the singular values that are trained.

Adam moves every number of U and V by about the learning rate eta in a step. The columns of U are multiplied by their
singular values, and r of them add up with independent signs: an entry of the product U diag(s) V^T, seen along the
orthonormal columns of V, moves by about eta s sqrt(r), with s the root mean square of the singular values. The changes
of L layers add up as well. What is held fixed here is

    step = eta * scale * s * sqrt(r L),

with `scale` the factor on U diag(s) V^T, and the mean over the layers taken of logarithms. Where columns have rates
s^-p of their own, s^(1 - p) takes the place of s. The step is a first guess from the best rates of two models.
"""

import math
from collections.abc import Sequence

STEP = 0.1
"""The step that one learning rate should make, without a unit of its own: that of the weights."""


def suggested_rate(layers: Sequence[tuple[float, int]]) -> float:
    """The learning rate eta_d for a model, of two significant digits.

    Args:
        layers: (scale * s^(1 - p), the rank r) of each adapted layer.

    Raises:
        ValueError: no layer is given, or none has a singular value above 0.
    """
    logs = [math.log(s) + math.log(rank) / 2 for s, rank in layers if s > 0]
    if not logs:
        raise ValueError(
            "train.learning_rate=auto follows from singular values, and all that are trained are 0 or rounding: set a "
            "number"
        )
    rate = STEP / (math.exp(sum(logs) / len(logs)) * math.sqrt(len(layers)))
    return float(f"{rate:.1e}")
