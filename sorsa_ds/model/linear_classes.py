"""Subclasses of nn.Linear: which of them still compute a linear, as Falcon's does, and which do not, as routers do."""

from collections.abc import Hashable
from functools import cache

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_M, _N = 3, 5


@cache
def computes_linear(kind: Hashable) -> bool:
    """Whether a class's forward is that of nn.Linear or Conv1D: x W^T + bias, and nothing else.

    A forward of the class's own is tried on small random numbers, with and without a bias. One that needs more of its
    object than a linear has, or returns something else than a tensor, is none.
    """
    assert isinstance(kind, type)
    if getattr(kind, "forward", None) in (nn.Linear.forward, Conv1D.forward):
        return True
    return issubclass(kind, nn.Linear) and all(_is_as_linear(kind, bias) for bias in (False, True))


def _is_as_linear(kind: type[nn.Linear], bias: bool) -> bool:
    linear, other = nn.Linear(_N, _M, bias=bias), kind.__new__(kind)
    other.__dict__.update(linear.__dict__)  # the same parameters, and nothing that a constructor would add
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x_BTN = torch.randn(2, 4, _N, generator=generator)
        try:
            found = other(x_BTN)
        except Exception:
            return False
        return isinstance(found, torch.Tensor) and torch.allclose(found, linear(x_BTN), atol=1e-5)
