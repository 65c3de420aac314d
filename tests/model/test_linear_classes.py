"""Which subclasses of nn.Linear still compute a linear."""

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from sorsa_ds.model.linear_classes import computes_linear


class _Named(nn.Linear):
    """A linear that only prints in another way."""

    def extra_repr(self) -> str:
        return "mine"


class _WithoutBias(nn.Linear):
    """A linear that forgets its bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


class _Scaled(nn.Linear):
    """A linear with a factor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.01


@pytest.mark.parametrize(
    ("kind", "linear"),
    [
        (nn.Linear, True), (Conv1D, True), (_Named, True), (FalconLinear, True),
        (_WithoutBias, False), (_Scaled, False), (Llama4Router, False),
    ],
)  # fmt: skip
def test_a_class_is_a_linear_by_what_it_computes(kind, linear):
    assert computes_linear(kind) is linear
