"""The regulariser on the fp32 masters, wherever ZeRO has put them: one all-reduce of Gram matrices a step.

A fragment of a factor X (P, R) is a flat range of its row-major numbers: whole rows, and at either end perhaps a piece
of a row that a partition boundary has cut. Whole rows enter the rank's own sum X_i^T X_i. Cut rows (at most world - 1 a
matrix, none where the world size divides) travel in the same all-reduce, so that every rank sees them whole.

Gram matrices are summed in float64: E = G - I is then exact for the fp32 masters even where it is rounding noise, and
the gradient's direction E / ||E|| does not depend on how the rows are cut.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from deepspeed import comm as dist
from torch import Tensor

from sorsa_ds.masters import Fragment, Masters
from sorsa_ds.precision import full_fp32_products
from sorsa_ds.regularizer import Regularizer, gradient_factor, penalty


@dataclass(slots=True)
class _Piece:
    """Part of a cut row: columns [column, column + numel) of cut row number `slot` of its matrix, at `start` of the
    fragment."""

    slot: int
    column: int
    start: int
    numel: int


@dataclass(slots=True)
class _Cut:
    """How one fragment falls into rows: `whole` rows from flat position `start` of the fragment, and its pieces."""

    matrix: int
    start: int
    whole: int
    pieces: list[_Piece]


class ShardedRegularizer:
    """Computes L_reg once a step and adds (gamma / eta_d) grad L_reg to the masters' gradients.

    Args:
        regularizer: the form, reduction and coefficient.
        masters: this rank's fragments; those named `...U` and `...V` are regularised.
        shapes: full shapes of all trained tensors, in the same order on every rank.
        device: where Gram matrices are summed; fragments offloaded to the host are computed there too.
    """

    def __init__(self, regularizer: Regularizer, masters: Masters, shapes: dict[str, torch.Size], device: torch.device):
        self.regularizer = regularizer
        self.device = device
        names = [name for name in shapes if name.rpartition(".")[2] in ("U", "V")]
        # Matrices of equal rank lie side by side in the buffer, so that each rank's E is one batched tensor.
        names.sort(key=lambda name: shapes[name][1])
        index = {name: i for i, name in enumerate(names)}
        self._ranks = [shapes[name][1] for name in names]
        self._fragments = [f for f in masters.fragments if f.name in index]
        self._sum_over_ranks = masters.sharded and dist.get_world_size() > 1
        cut_rows = self._find_cut_rows(index) if self._sum_over_ranks else [[] for _ in names]
        self._cuts = [_cut(f, index[f.name], cut_rows[index[f.name]]) for f in self._fragments]

        gram_numbers = sum(r * r for r in self._ranks)
        row_numbers = sum(len(rows) * r for rows, r in zip(cut_rows, self._ranks, strict=True))
        self._buffer = torch.zeros(gram_numbers + row_numbers, dtype=torch.float64, device=device)
        sizes = [r * r for r in self._ranks]
        self._grams = [g.view(r, r) for g, r in zip(self._buffer[:gram_numbers].split(sizes), self._ranks, strict=True)]
        by_rank = [(r, len(list(same))) for r, same in groupby(self._ranks)]
        batches = self._buffer[:gram_numbers].split([count * r * r for r, count in by_rank])
        self._batches = [batch.view(count, r, r) for batch, (r, count) in zip(batches, by_rank, strict=True)]
        sizes = [len(rows) * r for rows, r in zip(cut_rows, self._ranks, strict=True)]
        self._cut_rows = [
            rows.view(-1, r) for rows, r in zip(self._buffer[gram_numbers:].split(sizes), self._ranks, strict=True)
        ]
        self._by_master: dict[int, list[tuple[Fragment, _Cut]]] = {}
        for fragment, cut in zip(self._fragments, self._cuts, strict=True):
            self._by_master.setdefault(id(fragment.master), []).append((fragment, cut))
        self._factors: list[Tensor] = []

    @torch.no_grad()
    def prepare(self) -> tuple[Tensor, Tensor]:
        """Sum the Gram matrices over the ranks and keep the gradient factors for `add_to`. A collective call.

        Returns:
            (value of L_reg, Frobenius norm of the term (gamma / eta_d) grad L_reg that will be added), 0-D float64.
        """
        self._buffer.zero_()
        for fragment, cut in zip(self._fragments, self._cuts, strict=True):
            values = fragment.values().to(self.device)
            gram = self._grams[cut.matrix]
            rows = values[cut.start : cut.start + cut.whole * len(gram)].view(-1, len(gram)).double()
            torch.mm(rows.t(), rows, out=gram)
            for piece in cut.pieces:
                row = self._cut_rows[cut.matrix][piece.slot]
                row[piece.column : piece.column + piece.numel] = values[piece.start : piece.start + piece.numel]
        if self._sum_over_ranks:
            dist.all_reduce(self._buffer)
        for gram, rows in zip(self._grams, self._cut_rows, strict=True):
            if len(rows):
                gram.addmm_(rows.t(), rows)
        return self._differentiate()

    @torch.no_grad()
    def add_to(self, master: Tensor) -> None:
        """Add (gamma / eta_d) grad L_reg to `master.grad`, for the fragments that lie in this master."""
        for fragment, cut in self._by_master.get(id(master), ()):
            factor, values, gradient = self._factors[cut.matrix], fragment.values(), fragment.gradient()
            span = slice(cut.start, cut.start + cut.whole * len(factor))
            rows = values[span].view(-1, len(factor)).to(self.device)
            with full_fp32_products():
                gradient[span] += (rows @ factor).view(-1).to(gradient)
            for piece in cut.pieces:
                row_gradient = self._cut_rows[cut.matrix][piece.slot].to(factor) @ factor
                part = row_gradient[piece.column : piece.column + piece.numel]
                gradient[piece.start : piece.start + piece.numel] += part.to(gradient)

    def _differentiate(self) -> tuple[Tensor, Tensor]:
        """L_reg, the norm of the added term, and the factors F (times the coefficient, fp32) from the Gram matrices."""
        reg = self.regularizer
        weight = 1.0 / len(self._ranks) if reg.reduction == "mean" else 1.0
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        square = torch.zeros_like(value)
        self._factors = []
        for gram in self._batches:
            error = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            factor = reg.coefficient * weight * gradient_factor(error, reg.form)
            value += weight * penalty(error, reg.form).sum()
            square += ((factor @ gram) * factor).sum()  # ||X F||^2 = tr(F X^T X F), F symmetric
            self._factors.extend(factor.float().unbind())
        return value, square.clamp_min(0).sqrt()

    def _find_cut_rows(self, index: dict[str, int]) -> list[list[int]]:
        """For each matrix the rows that some rank's fragment begins or ends inside. A collective call."""
        mine = [(index[f.name], f.start, f.start + f.numel) for f in self._fragments]
        everyone: list = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        cut_rows: list[set[int]] = [set() for _ in index]
        for matrix, start, end in (edge for rank in everyone for edge in rank):
            r = self._ranks[matrix]
            cut_rows[matrix].update(edge // r for edge in (start, end) if edge % r)
        return [sorted(rows) for rows in cut_rows]


def _cut(fragment: Fragment, matrix: int, cut_rows: list[int]) -> _Cut:
    """Divide a fragment into its whole rows and its pieces of cut rows."""
    r = fragment.shape[1]
    start, end = fragment.start, fragment.start + fragment.numel
    pieces = []
    for slot, row in enumerate(cut_rows):
        first, last = max(start, row * r), min(end, (row + 1) * r)
        if first < last:
            pieces.append(_Piece(slot, first - row * r, first - start, last - first))
    first_whole = -(-start // r)
    whole = max(0, end // r - first_whole)
    return _Cut(matrix, first_whole * r - start if whole else 0, whole, pieces)
