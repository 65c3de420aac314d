"""Gram matrices of all U and V, computed from fp32 masters that ZeRO has partitioned, with a single all-reduce.

A fragment of a factor X (P, R) is a flat range of its row-major numbers: whole rows, and at either end perhaps a piece
of a row that a partition boundary has cut. Whole rows enter the rank's own sum X_i^T X_i. Cut rows are completed in the
same all-reduce, so that every rank sees them whole. There are at most world - 1 of them per matrix, and none where the
world size divides P.

A product X F with an (R, R) matrix needs no further communication: each rank multiplies its own rows.

Gram matrices are summed in float64. E = G - I is then exact for the fp32 masters even where it consists of rounding
errors, and does not depend on how the rows are cut.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from deepspeed import comm as dist
from torch import Tensor

from sorsa_ds.engine.masters import Fragment, Masters
from sorsa_ds.runtime import collectives


@dataclass(slots=True)
class _Piece:
    """The part of a cut row that lies in a fragment.

    It consists of columns [column, column + numel) of the cut row number `slot` of its matrix, and begins at flat
    position `start` of the fragment.
    """

    slot: int
    column: int
    start: int
    numel: int


@dataclass(slots=True)
class Rows:
    """How a fragment of matrix number `matrix` divides into rows.

    There are `whole` complete rows, which begin at flat position `start` of the fragment, and pieces of cut rows.
    """

    fragment: Fragment
    matrix: int
    start: int
    whole: int
    pieces: list[_Piece]

    def times(self, values: Tensor, cut_rows: Tensor, factor: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The fragment's part of X F, as pairs of a range of the fragment and its values, in F's dtype on F's device.

        Args:
            values: the fragment's numbers of X, flat.
            cut_rows: the cut rows of X, whole (rows, R).
            factor: F (R, R).
        """
        span = slice(self.start, self.start + self.whole * len(factor))
        yield span, (values[span].view(-1, len(factor)).to(factor) @ factor).view(-1)
        for piece in self.pieces:
            row = cut_rows[piece.slot].to(factor) @ factor
            yield slice(piece.start, piece.start + piece.numel), row[piece.column : piece.column + piece.numel]


class ShardedGrams:
    """The Gram matrices X^T X of all U and V, and their cut rows. Constructing it is a collective call.

    Args:
        masters: this rank's fragments.
        shapes: full shapes of all trained tensors, in the same order on every rank.
        device: where the Gram matrices are summed. Fragments that are offloaded to the host are sent there.

    Attributes:
        names: names of the matrices, sorted by rank.
        grams: one Gram matrix (R, R) per matrix, float64.
        batches: views of the Gram matrices, those of equal rank together as (count, R, R).
        cut_rows: the cut rows (rows, R) of each matrix, float64.
        fragments: how this rank's fragments divide into rows.
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
        """Compute the Gram matrices and the cut rows of the masters as they are now. A collective call."""
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
        """This rank's pieces of the cut rows of other tensors that are laid out like the masters, such as moments.

        They are zero where other ranks have pieces, so that their sum over the ranks gives the whole rows.

        Args:
            read: returns the numbers of such a tensor for a fragment, flat.

        Returns:
            One flat float64 tensor with all of them, and its views (rows, R) for each matrix.
        """
        flat = torch.zeros(sum(map(Tensor.numel, self.cut_rows)), dtype=torch.float64, device=self.device)
        rows = self._per_matrix(flat)
        for part in self.fragments:
            if part.pieces:
                self._put_pieces(part, read(part.fragment), rows)
        return flat, rows

    def _per_matrix(self, flat: Tensor) -> list[Tensor]:
        """Views (rows, R) into a flat tensor for the cut rows of each matrix."""
        sizes = [len(rows) * r for rows, r in zip(self._cut_at, self._ranks, strict=True)]
        return [rows.view(-1, r) for rows, r in zip(flat.split(sizes), self._ranks, strict=True)]

    @staticmethod
    def _put_pieces(part: Rows, values: Tensor, cut_rows: list[Tensor]) -> None:
        """Copy a fragment's pieces of cut rows to their places."""
        for piece in part.pieces:
            row = cut_rows[part.matrix][piece.slot]
            row[piece.column : piece.column + piece.numel] = values[piece.start : piece.start + piece.numel]

    def _find_cut_rows(self, fragments: list[Fragment], index: dict[str, int]) -> list[list[int]]:
        """For each matrix, the rows inside which some rank's fragment begins or ends. A collective call."""
        mine = [(index[f.name], f.start, f.start + f.numel) for f in fragments]
        cut_rows: list[set[int]] = [set() for _ in index]
        for matrix, start, end in collectives.gather_lists(mine):
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
