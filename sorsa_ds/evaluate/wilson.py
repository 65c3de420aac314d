"""The Wilson score interval of a proportion."""

import math

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The interval in which the true rate lies with 95 % confidence, of `correct` successes in `total` trials.

    Wilson (1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    if total == 0:
        return 0.0, 1.0
    rate = correct / total
    middle = rate + z * z / (2 * total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
