"""Gram matrices of all U and V, computed from fp32 masters that ZeRO has partitioned, with a single all-reduce.

A fragment of a factor X (P, R) is a flat range of its row-major numbers: whole rows, and at either end perhaps a piece
of a row that a partition boundary has cut. Whole rows enter the rank's own sum X_i^T X_i. Cut rows are completed in the
same all-reduce, so that every rank sees them whole. There are at most world - 1 of them per matrix, and none where the
world size divides P.

A factor (E, P, R) of E experts is E matrices one after the other. Those that lie in a fragment whole are multiplied in
one product; of the two at its ends, a fragment may hold a part.

A product X F with an (R, R) matrix needs no further communication: each rank multiplies its own rows.

Gram matrices are summed in float64. E = G - I is then exact for the fp32 masters even where it consists of rounding
errors, and does not depend on how the rows are cut.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from deepspeed import comm as dist
from torch import Tensor

from sorsa_ds.engine.masters import Fragment, Masters
from sorsa_ds.runtime import collectives

TOGETHER = 2**21
"""Numbers of factors that are multiplied at once, 16 MiB in fp64: small ones wait for the launch of their kernels."""


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
    """How a fragment divides into rows: of matrix number `matrix`, or of several whole ones from there on.

    There are `whole` complete rows, which begin at flat position `start` of the fragment, in equal parts of `matrices`
    matrices, and pieces of cut rows, where it is a single matrix.
    """

    fragment: Fragment
    matrix: int
    matrices: int
    start: int
    whole: int
    pieces: list[_Piece]

    @property
    def numbers(self) -> slice:
        """The matrices whose rows these are."""
        return slice(self.matrix, self.matrix + self.matrices)

    def rows(self, values: Tensor) -> Tensor:
        """The whole rows (matrices, rows, R) in the fragment's numbers, which are flat."""
        rank = self.fragment.shape[-1]
        return values[self.start : self.start + self.whole * rank].view(self.matrices, -1, rank)

    def times(self, values: Tensor, cut_rows: Sequence[Tensor], factors: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The fragment's part of X F, as pairs of a range of the fragment and its values, in F's dtype on F's device.

        Args:
            values: the fragment's numbers of X, flat.
            cut_rows: the cut rows of each matrix, whole (rows, R).
            factors: F of each of these matrices, (matrices, R, R).
        """
        rows = self.rows(values)
        yield slice(self.start, self.start + rows.numel()), (rows.to(factors) @ factors).view(-1)
        yield from self.cut_times(cut_rows, factors)

    def cut_times(self, cut_rows: Sequence[Tensor], factors: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The part of `times` that comes from pieces of cut rows."""
        for piece in self.pieces:
            row = cut_rows[self.matrix][piece.slot].to(factors) @ factors[0]
            yield slice(piece.start, piece.start + piece.numel), row[piece.column : piece.column + piece.numel]


@dataclass(slots=True)
class Alike:
    """Parts of fragments that have as many whole rows of each matrix, which are multiplied in one product.

    batch: which of the tensors that lie like `ShardedGrams.batches` holds their matrices, and `places` where in it.
    """

    parts: list[Rows]
    batch: int
    places: Tensor

    def rows(self, read: Callable[[Fragment], Tensor]) -> Tensor:
        """The whole rows (matrices, rows, R) of all parts, one part behind the other.

        Args:
            read: returns the numbers for a fragment, flat.
        """
        found = [part.rows(read(part.fragment)) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def divide(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows that lie as those of `rows` do, cut into each part's."""
        return rows.split([part.matrices for part in self.parts])


class ShardedGrams:
    """The Gram matrices X^T X of all U and V, and their cut rows. Constructing it is a collective call.

    Args:
        masters: this rank's fragments.
        shapes: full shapes of all trained tensors, in the same order on every rank.
        device: where the Gram matrices are summed. Fragments that are offloaded to the host are sent there.

    Attributes:
        names: names of the factors, sorted by rank.
        spans: name of a factor -> the numbers of its matrices, of which experts have several.
        grams: one Gram matrix (R, R) per matrix, float64.
        batches: views of the Gram matrices, those of equal rank together as (count, R, R).
        cut_rows: the cut rows (rows, R) of each matrix, float64.
        fragments: how this rank's fragments divide into rows.
        alike: the same, in groups that are multiplied together.
    """

    def __init__(self, masters: Masters, shapes: dict[str, torch.Size], device: torch.device):
        self.device, self.sharded = device, masters.sharded and dist.get_world_size() > 1
        self.names = [name for name in shapes if name.rpartition(".")[2] in ("U", "V")]
        self.names.sort(key=lambda name: shapes[name][-1])
        self.spans: dict[str, slice] = {}
        self._ranks: list[int] = []
        for name in self.names:
            matrices = shapes[name][0] if len(shapes[name]) == 3 else 1
            self.spans[name] = slice(len(self._ranks), len(self._ranks) + matrices)
            self._ranks += [shapes[name][-1]] * matrices
        mine = [part for f in masters.fragments if f.name in self.spans for part in _by_matrix(f, self.spans[f.name])]
        self._cut_at = self._find_cut_rows(mine) if self.sharded else [[] for _ in self._ranks]
        self.fragments = [_rows(f, first, count, self._cut_at[first]) for f, first, count in mine]

        sizes = [r * r for r in self._ranks]
        row_numbers = sum(len(rows) * r for rows, r in zip(self._cut_at, self._ranks, strict=True))
        self._buffer = torch.zeros(sum(sizes) + row_numbers, dtype=torch.float64, device=device)
        grams, rows = self._buffer.split([sum(sizes), row_numbers])
        self.grams = [g.view(r, r) for g, r in zip(grams.split(sizes), self._ranks, strict=True)]
        by_rank = [(r, len(list(same))) for r, same in groupby(self._ranks)]
        batches = grams.split([count * r * r for r, count in by_rank])
        self.batches = [batch.view(count, r, r) for batch, (r, count) in zip(batches, by_rank, strict=True)]
        self._batch_of = [(batch, place) for batch, (_, count) in enumerate(by_rank) for place in range(count)]
        self.cut_rows = self._per_matrix(rows)
        self._cut = [matrix for matrix, cut in enumerate(self._cut_at) if cut]
        self.alike = self.group(self.fragments)

    @torch.no_grad()
    def take(self) -> None:
        """Compute the Gram matrices and the cut rows of the masters as they are now. A collective call."""
        self._buffer.zero_()
        for group in self.alike:
            rows = group.rows(Fragment.values).to(self.device).double()
            self.batches[group.batch].index_copy_(0, group.places, rows.mT @ rows)
        for part in self.fragments:
            if part.pieces:
                self._put_pieces(part, part.fragment.values(), self.cut_rows)
        if self.sharded:
            dist.all_reduce(self._buffer)
        for matrix in self._cut:
            self.grams[matrix].addmm_(self.cut_rows[matrix].t(), self.cut_rows[matrix])

    def group(self, parts: Iterable[Rows]) -> list[Alike]:
        """Parts in groups of as many rows, each of at most TOGETHER numbers unless it is a single part."""
        found: list[Alike] = []
        by_shape: dict[tuple, list[Rows]] = {}
        for part in parts:
            if part.whole:
                batch, _ = self._batch_of[part.matrix]
                shape = batch, part.whole // part.matrices, part.fragment.master.dtype
                by_shape.setdefault(shape, []).append(part)
        for (batch, *_), same in by_shape.items():
            size = max(1, TOGETHER // max(part.whole * part.fragment.shape[-1] for part in same))
            for some in (same[at : at + size] for at in range(0, len(same), size)):
                places = [self._batch_of[part.matrix][1] + one for part in some for one in range(part.matrices)]
                found.append(Alike(some, batch, torch.tensor(places, device=self.device)))
        return found

    def within(self, batches: Sequence[Tensor], numbers: slice) -> Tensor:
        """The matrices (count, R, R) with these numbers, all of one factor, in tensors that lie like `batches`."""
        batch, place = self._batch_of[numbers.start]
        return batches[batch][place : place + numbers.stop - numbers.start]

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

    def _find_cut_rows(self, parts: list[tuple[Fragment, int, int]]) -> list[list[int]]:
        """For each matrix, the rows inside which some rank's fragment begins or ends. A collective call."""
        mine = [(matrix, f.start, f.start + f.numel) for f, matrix, count in parts if count == 1]
        cut_rows: list[set[int]] = [set() for _ in self._ranks]
        for matrix, start, end in collectives.gather_lists(mine):
            r = self._ranks[matrix]
            cut_rows[matrix].update(edge // r for edge in (start, end) if edge % r)
        return [sorted(rows) for rows in cut_rows]


def _by_matrix(fragment: Fragment, numbers: slice) -> Iterator[tuple[Fragment, int, int]]:
    """A fragment in parts that are of one matrix, or of several whole ones: (part, first matrix, number of matrices).

    Args:
        numbers: the numbers that the matrices of the fragment's factor have among all matrices.
    """
    shape = fragment.shape[-2:]
    size = shape.numel()
    position, end = fragment.start, fragment.start + fragment.numel
    while position < end:
        matrix, within = divmod(position, size)
        count = 1 if within else max(1, (end - position) // size)
        stop = min(end, (matrix + count) * size)
        offset = fragment.offset + position - fragment.start
        part = Fragment(fragment.name, shape, within, stop - position, fragment.master, offset)
        yield part, numbers.start + matrix, count
        position = stop


def _rows(fragment: Fragment, matrix: int, count: int, cut_rows: list[int]) -> Rows:
    """Divide a part of one matrix into its whole rows and its pieces of cut rows; several matrices have only the
    former."""
    r = fragment.shape[-1]
    if count > 1:
        return Rows(fragment, matrix, count, 0, fragment.numel // r, [])
    start, end = fragment.start, fragment.start + fragment.numel
    pieces = []
    for slot, row in enumerate(cut_rows):
        first, last = max(start, row * r), min(end, (row + 1) * r)
        if first < last:
            pieces.append(_Piece(slot, first - row * r, first - start, last - first))
    first_whole = -(-start // r)
    whole = max(0, end // r - first_whole)
    return Rows(fragment, matrix, 1, first_whole * r - start if whole else 0, whole, pieces)
