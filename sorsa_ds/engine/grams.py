"""Gram matrices of U and V on the fp32 masters, wherever ZeRO has put them: one all-reduce of all of them.

A fragment of a factor X (P, R) is a flat range of its row-major numbers: whole rows, and at either end perhaps a piece
of a row that a partition boundary has cut. Whole rows enter the rank's own sum X_i^T X_i. Cut rows (at most world - 1 a
matrix, none where the world size divides) travel in the same all-reduce, so that every rank sees them whole.

A product X F with an (R, R) matrix needs nothing else: each rank multiplies its own rows.

Gram matrices are summed in float64: E = G - I is then exact for the fp32 masters even where it is rounding noise, and
does not depend on how the rows are cut.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from deepspeed import comm as dist
from torch import Tensor

from sorsa_ds.engine.masters import Fragment, Masters


@dataclass(slots=True)
class _Piece:
    """Part of a cut row: columns [column, column + numel) of cut row number `slot` of its matrix, at `start` of the
    fragment."""

    slot: int
    column: int
    start: int
    numel: int


@dataclass(slots=True)
class Rows:
    """How a fragment of matrix number `matrix` falls into rows: `whole` ones from flat position `start` of the
    fragment, and pieces of cut ones."""

    fragment: Fragment
    matrix: int
    start: int
    whole: int
    pieces: list[_Piece]

    def times(self, values: Tensor, cut_rows: Tensor, factor: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The fragment's part of X F: ranges of the fragment and what belongs there, in F's dtype on its device.

        Args:
            values: the fragment's numbers of X. cut_rows: X's cut rows, whole. factor: F (R, R).
        """
        span = slice(self.start, self.start + self.whole * len(factor))
        yield span, (values[span].view(-1, len(factor)).to(factor) @ factor).view(-1)
        for piece in self.pieces:
            row = cut_rows[piece.slot].to(factor) @ factor
            yield slice(piece.start, piece.start + piece.numel), row[piece.column : piece.column + piece.numel]


class ShardedGrams:
    """The Gram matrices X^T X of all U and V, and their cut rows. Its constructor is a collective call.

    Args:
        masters: this rank's fragments.
        shapes: full shapes of all trained tensors, in the same order on every rank.
        device: where they are summed; fragments offloaded to the host are sent there.

    names: of the matrices, those of equal rank side by side. grams: (R, R) each, float64; batches: the same, those of
    equal rank as one (count, R, R). cut_rows: (rows, R) of each matrix, float64. fragments: this rank's.
    """

    def __init__(self, masters: Masters, shapes: dict[str, torch.Size], device: torch.device):
        self.device, self.sharded = device, masters.sharded and dist.get_world_size() > 1
        self.names = [name for name in shapes if name.rpartition(".")[2] in ("U", "V")]
        self.names.sort(key=lambda name: shapes[name][1])
        index = {name: i for i, name in enumerate(self.names)}
        self._ranks = [shapes[name][1] for name in self.names]
        mine = [f for f in masters.fragments if f.name in index]
        self._cut_at = self._find_cut_rows(mine, index) if self.sharded else [[] for _ in self.names]
        self.fragments = [_rows(f, index[f.name], self._cut_at[index[f.name]]) for f in mine]

        sizes = [r * r for r in self._ranks]
        row_numbers = sum(len(rows) * r for rows, r in zip(self._cut_at, self._ranks, strict=True))
        self._buffer = torch.zeros(sum(sizes) + row_numbers, dtype=torch.float64, device=device)
        grams, rows = self._buffer.split([sum(sizes), row_numbers])
        self.grams = [g.view(r, r) for g, r in zip(grams.split(sizes), self._ranks, strict=True)]
        by_rank = [(r, len(list(same))) for r, same in groupby(self._ranks)]
        batches = grams.split([count * r * r for r, count in by_rank])
        self.batches = [batch.view(count, r, r) for batch, (r, count) in zip(batches, by_rank, strict=True)]
        self.cut_rows = self._per_matrix(rows)

    @torch.no_grad()
    def take(self) -> None:
        """Sum the Gram matrices of the masters as they are now, and see their cut rows whole. A collective call."""
        self._buffer.zero_()
        for part in self.fragments:
            values, gram = part.fragment.values().to(self.device), self.grams[part.matrix]
            rows = values[part.start : part.start + part.whole * len(gram)].view(-1, len(gram)).double()
            torch.mm(rows.t(), rows, out=gram)
            self._put_pieces(part, values, self.cut_rows)
        if self.sharded:
            dist.all_reduce(self._buffer)
        for gram, rows in zip(self.grams, self.cut_rows, strict=True):
            if len(rows):
                gram.addmm_(rows.t(), rows)

    def own_cut_rows(self, read: Callable[[Fragment], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """This rank's pieces of the cut rows of other tensors that are laid out as the masters, in float64, zero where
        others have theirs: to be summed over the ranks.

        Args:
            read: a fragment's numbers.

        Returns:
            all of them in one, and its views: (rows, R) of each matrix.
        """
        flat = torch.zeros(sum(map(Tensor.numel, self.cut_rows)), dtype=torch.float64, device=self.device)
        rows = self._per_matrix(flat)
        for part in self.fragments:
            if part.pieces:
                self._put_pieces(part, read(part.fragment), rows)
        return flat, rows

    def _per_matrix(self, flat: Tensor) -> list[Tensor]:
        """Views of the cut rows of each matrix."""
        sizes = [len(rows) * r for rows, r in zip(self._cut_at, self._ranks, strict=True)]
        return [rows.view(-1, r) for rows, r in zip(flat.split(sizes), self._ranks, strict=True)]

    @staticmethod
    def _put_pieces(part: Rows, values: Tensor, cut_rows: list[Tensor]) -> None:
        for piece in part.pieces:
            row = cut_rows[part.matrix][piece.slot]
            row[piece.column : piece.column + piece.numel] = values[piece.start : piece.start + piece.numel]

    def _find_cut_rows(self, fragments: list[Fragment], index: dict[str, int]) -> list[list[int]]:
        """For each matrix the rows that some rank's fragment begins or ends inside. A collective call."""
        mine = [(index[f.name], f.start, f.start + f.numel) for f in fragments]
        everyone: list = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        cut_rows: list[set[int]] = [set() for _ in index]
        for matrix, start, end in (edge for rank in everyone for edge in rank):
            r = self._ranks[matrix]
            cut_rows[matrix].update(edge // r for edge in (start, end) if edge % r)
        return [sorted(rows) for rows in cut_rows]


def _rows(fragment: Fragment, matrix: int, cut_rows: list[int]) -> Rows:
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
    return Rows(fragment, matrix, first_whole * r - start if whole else 0, whole, pieces)
