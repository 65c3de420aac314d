"""Which rows of a batch belong to which expert, and products of rows with the matrices of their experts.

Shapes, used as suffixes of tensor names: E experts; S pairs of a token and one of its experts, sorted by expert, as
rows; P and Q the sides of a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Form = Literal["loop", "grouped", "batched"]
"""How products are made. `loop`: one expert after the other. `grouped`: one kernel for all experts. `batched`: a copy
of its expert's matrix for each row, which is quick only for as few rows as one token has."""

_GROUPED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that PyTorch's grouped product takes."""

_ALIGNED = 16
"""Bytes of which addresses and lengths of rows must be multiples in PyTorch's grouped product."""


@dataclass(slots=True)
class Routes:
    """The rows of each expert.

    expert: (S,) the expert of each row, ascending.
    ends: (E,) int32, the number of rows of the experts up to each.
    form: how products are made.
    """

    expert: Tensor
    ends: Tensor
    form: Form
    _on_host: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, chosen: Tensor, experts: int, form: Form) -> tuple["Routes", Tensor]:
        """The routes of tokens, and the order (S,) in which pairs of token and expert become rows.

        Args:
            chosen: (tokens, K) the experts of each token.
            experts: E.
        """
        expert, order = chosen.reshape(-1).sort(stable=True)
        steps = torch.arange(experts, device=chosen.device, dtype=expert.dtype)
        return cls(expert, torch.searchsorted(expert, steps, right=True).int(), form), order

    @classmethod
    def even(cls, rows: int, experts: int, device: torch.device, form: Form) -> "Routes":
        """The routes of rows that are divided evenly among the experts, as they lie."""
        each = rows // experts
        expert = torch.arange(experts, device=device).repeat_interleave(each)
        return cls(expert, torch.arange(each, rows + 1, each, device=device, dtype=torch.int32), form)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each expert. The first time it waits for the device.

        On the meta device there are no numbers; there every expert has equally many rows, as nearly as that can be.
        """
        if not self._on_host:
            rows, experts = len(self.expert), len(self.ends)
            even = [rows * (number + 1) // experts for number in range(experts)]
            self._on_host = [0, *(even if self.ends.is_meta else self.ends.tolist())]
        return list(zip(self._on_host[:-1], self._on_host[1:], strict=True))

    def hit(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, each with them."""
        for expert, (first, end) in enumerate(self.spans):
            if first < end:
                yield expert, slice(first, end)

    def part(self, first: int, end: int) -> tuple["Routes", slice]:
        """The routes of the experts from `first` to `end` alone, and the rows that they have."""
        spans = self.spans
        rows = slice(spans[first][0], spans[end - 1][1])
        on_host = [self._on_host[number] - rows.start for number in range(first, end + 1)]
        own = replace(self, expert=self.expert[rows] - first, ends=self.ends[first:end] - rows.start, _on_host=on_host)
        return own, rows

    def times(self, x_SQ: Tensor, W_EPQ: Tensor) -> Tensor:
        """x_e W_e^T for each expert e: (S, P). It has no gradient."""
        form = self._form(x_SQ, W_EPQ)
        if form == "grouped":
            return torch.nn.functional.grouped_mm(x_SQ, W_EPQ.mT, offs=self.ends)
        if form == "batched":
            return torch.bmm(W_EPQ[self.expert], x_SQ.unsqueeze(-1)).squeeze(-1)
        y_SP = x_SQ.new_empty(len(x_SQ), W_EPQ.shape[1])
        for expert, rows in self.hit():
            torch.mm(x_SQ[rows], W_EPQ[expert].t(), out=y_SP[rows])
        return y_SP

    def outer(self, a_SP: Tensor, b_SQ: Tensor) -> Tensor:
        """a_e^T b_e for each expert e: (E, P, Q), zero where it has no row. It has no gradient.

        In the form `batched` the order of the sums is not the same on every run on a GPU, unless PyTorch is told to be
        deterministic.
        """
        form = self._form(a_SP, b_SQ)
        if form == "grouped":
            return torch.nn.functional.grouped_mm(a_SP.t(), b_SQ, offs=self.ends)
        products = a_SP.new_zeros(len(self.ends), a_SP.shape[1], b_SQ.shape[1])
        if form == "batched":
            return products.index_add_(0, self.expert, a_SP.unsqueeze(2) * b_SQ.unsqueeze(1))
        for expert, rows in self.hit():
            torch.mm(a_SP[rows].t(), b_SQ[rows], out=products[expert])
        return products

    def _form(self, *operands: Tensor) -> Form:
        """The form for these operands: a grouped product does not take all."""
        if self.form != "grouped" or not len(self.expert):
            return "loop" if self.form == "grouped" else self.form
        fits = all(tensor.dtype in _GROUPED and _aligned(tensor) for tensor in operands)
        return "grouped" if fits else "loop"


def _aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins, and its rows follow each other, at multiples of the bytes that the product reads."""
    steps = list(tensor.stride())
    if 1 in steps:
        steps.remove(1)  # one only: a matrix with a single column has two, of which one is the step between its rows
    return tensor.data_ptr() % _ALIGNED == 0 and all(step * tensor.element_size() % _ALIGNED == 0 for step in steps)
