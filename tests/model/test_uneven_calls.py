"""Modules that call others as often as their tokens say are found in their source, and made leaves of ZeRO-3."""

import pytest
import torch
from deepspeed.utils import z3_leaf_module
from torch import nn
from transformers.models.dbrx.configuration_dbrx import DbrxConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExperts

from sorsa_ds.model.uneven_calls import calls_unevenly, set_uneven_leaves, told_leaves


class _Module(nn.Module):
    """Experts in a list, and a projection for all tokens."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.up, self.nothing = nn.Linear(4, 4), nn.Identity()


class _Skips(_Module):
    def forward(self, x, mask):
        for number in range(len(self.experts)):
            layer = self.experts[number]
            rows = torch.where(mask[number])[0]
            if rows.shape[0] == 0:
                continue
            x[rows] = layer(x[rows])
        return x


class _Counts(_Module):
    def forward(self, x, chosen):
        counts = torch.bincount(chosen).tolist()
        for number, count in enumerate(counts):
            if count > 0:
                x = self.experts[number](x)
        return x


class _Hit(_Module):
    def forward(self, x, mask):
        hit = mask.sum((-1, -2)).nonzero()
        for number in hit:
            x = x + self.up(x) * number
        return x


class _Whether(_Module):
    def forward(self, x, mask):
        if mask.nonzero().numel():
            x = self.up(x)
        return x


class _All(_Module):
    def forward(self, x, mask):
        rows = torch.where(mask)[0]
        for layer in self.experts:
            x = layer(x)
        for number in range(3):
            x = self.experts[number](x)
        x = self.up(x)[rows]
        return x if self.training else self.up(x)


class _NoParameters(_Module):
    def forward(self, x, mask):
        for _ in mask.nonzero():
            x = self.nothing(x)
        return x


class _Any(_Module):
    def forward(self, x, chosen):
        for number in range(3):
            rows = chosen == number
            if rows.any():
                x = x + self.experts[number](x) * rows
        return x


class _Sum(_Module):
    def forward(self, x, mask):
        while mask.sum() > 0:
            x, mask = self.up(x), mask - 1
        return x


class _Rows(_Module):
    def forward(self, x, chosen):
        for number, layer in enumerate(self.experts):
            rows = x[chosen == number]
            if len(rows) == 0:
                continue
            x = x + layer(rows).sum()
        return x


class _Comprehension(_Module):
    def forward(self, x, chosen):
        return sum([self.experts[number](x) for number in chosen.unique().tolist()])


class _Finally(_Module):
    def forward(self, x, mask):
        try:
            x = x + 1
        finally:
            if mask.nonzero().numel():
                x = self.up(x)
        return x


class _Settings(_Module):
    def forward(self, x, scale=None):
        outputs = [layer(x) for layer in self.experts if scale is not None]
        if scale is not None and isinstance(scale, float):
            x = self.up(x)
        return x, outputs


EVEN, UNEVEN = (_All, _NoParameters, _Settings), (
    _Skips, _Counts, _Hit, _Whether, _Any, _Sum, _Rows, _Comprehension, _Finally
)  # fmt: skip


@pytest.mark.parametrize(("kind", "uneven"), [*((kind, False) for kind in EVEN), *((kind, True) for kind in UNEVEN)])
def test_uneven_calls_are_found_in_the_source(kind, uneven):
    assert calls_unevenly(kind()) is uneven


def test_only_the_module_that_makes_such_calls_is_a_leaf():
    config = DbrxConfig(d_model=16, ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 4})
    model = nn.ModuleList([DbrxExperts(config.ffn_config), _All()])
    assert set_uneven_leaves(model) == [model[0]]
    assert z3_leaf_module(model[0]) and not z3_leaf_module(model[1]) and not z3_leaf_module(model)
    assert "DbrxExperts (x1)" in told_leaves([model[0]])
