"""Makes U and V orthonormal again, to rounding, without changing what the layer computes.

Of a layer's U (m, r) and V (n, r) only the Gram matrices are needed; s is (r,):

    U^T U = C_U^T C_U,  V^T V = C_V^T C_V       Cholesky
    C_U diag(s) C_V^T = A diag(s') B^T          singular value decomposition, (r, r)
    U' = U T_U,  T_U = C_U^-1 A,   V' = V T_V,  T_V = C_V^-1 B

Then U' diag(s') V'^T = U diag(s) V^T and U'^T U' = V'^T V' = I. The order and the signs of the columns are still free.
They are chosen so that T_U and T_V are as close to the identity as possible: a column that has drifted a little moves a
little, and a negative s_i stays negative. Columns mix with each other only where their singular values lie closer
together than U and V have drifted from orthonormality; there they have to.

AdamW's moments belong to columns, so they must follow. Let G be the gradient of the weight.
- The first moment of U is a mean of U's gradients G V diag(s). The mean that U' would have had is therefore
  exp_avg diag(1/s) T_V diag(s'). Where columns mix, their s are equal up to the drift, and T_U and T_V are the same
  rotation; so exp_avg T_U equals that mean up to the drift, and needs no division by s. The first moment of V is
  multiplied by T_V for the same reason. Left unchanged, both would belong to columns that no longer exist.
- The second moment is a mean of squares, to which no matrix can be applied. It stays unchanged: columns that mix have
  almost equal s, hence gradients of almost equal size.
- Both moments of s stay unchanged, because each s_i is a number of its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from deepspeed import comm as dist
from torch import Tensor

from sorsa_ds.engine.grams import ShardedGrams
from sorsa_ds.engine.masters import Fragment, Masters
from sorsa_ds.runtime import collectives
from sorsa_ds.sorsa.rotations import rotations


class Reorthonormalizer:
    """Replaces U, s and V of all layers on masters that ZeRO has partitioned.

    A factor is only multiplied from the right, so its rows stay where they are. Communicated are the Gram matrices, s,
    the cut rows and the rotations. One rank decomposes a layer for all, so that every rank applies exactly the same
    matrices. A rank decomposes its share on its device, all layers of one rank r in a batch.

    Args:
        grams: Gram matrices of U and V.
        masters: this rank's fragments.
        state: the state of the inner optimizer: master -> its moments.
    """

    def __init__(self, grams: ShardedGrams, masters: Masters, state: Mapping[Tensor, dict[str, Tensor]]):
        self._grams, self._state = grams, state
        self._layers: list[str] = []
        first: dict[str, int] = {}
        places: list[tuple[int, int]] = []
        for name in grams.names:
            if name.endswith(".U"):
                layer = name.removesuffix(".U")
                numbers_u, numbers_v = (range(len(grams.grams))[grams.spans[f"{layer}.{side}"]] for side in "UV")
                first[f"{layer}.s"] = len(self._layers)
                places += zip(numbers_u, numbers_v, strict=True)
                self._layers += [layer] * len(numbers_u)
        self._s = [(first[f.name], f) for f in masters.fragments if f.name in first]
        self._shapes = [(len(batch) // 2, batch.shape[-1]) for batch in grams.batches]
        self._shares: list[tuple[Tensor, Tensor, Tensor]] = []
        begin = 0
        for layers, _ in self._shapes:
            mine = [n for n in range(begin, begin + layers) if n % collectives.world_size() == collectives.rank()]
            # Each layer has two matrices, so that 2 * begin matrices come before this batch.
            of_s, of_u, of_v = (
                torch.tensor([number - first for number in numbers], dtype=torch.long, device=grams.device)
                for numbers, first in (
                    (mine, begin),
                    ([places[n][0] for n in mine], 2 * begin),
                    ([places[n][1] for n in mine], 2 * begin),
                )
            )
            self._shares.append((of_s, of_u, of_v))
            begin += layers

    @torch.no_grad()
    def apply(self) -> None:
        """Make all U and V orthonormal, after the optimizer's step and before the copy into the model.

        A collective call.

        Raises:
            ValueError: on every rank, if some U or V no longer has full rank, or holds NaN or Inf.
        """
        self._grams.take()
        s, cut_moments = self._shared()
        turns, values = self._decompose(s)
        for part in self._grams.fragments:
            held = [
                (part.fragment.values(), self._grams.cut_rows),
                (self._first_moment(part.fragment), cut_moments),
            ]
            for numbers, cut_rows in held:
                for span, turned in part.times(numbers, cut_rows, self._grams.within(turns, part.numbers)):
                    numbers[span] = turned.to(numbers)
        by_layer = [one for batch in values for one in batch]
        for first, fragment in self._s:
            for layer, there, here in _pieces(fragment, first):
                fragment.values()[here] = by_layer[layer][there].to(fragment.values())

    def _shared(self) -> tuple[list[Tensor], list[Tensor]]:
        """s of every layer (layers, r) by rank r, and the first moments of the cut rows; float64.

        A process alone knows only parts of them.
        """
        flat, batches = _zeros(self._shapes, self._grams.device)
        s = [one for batch in batches for one in batch]
        for first, fragment in self._s:
            for layer, there, here in _pieces(fragment, first):
                s[layer][there] = fragment.values()[here].to(flat)
        moments, cut_moments = self._grams.own_cut_rows(self._first_moment)
        if self._grams.sharded:
            collectives.sum_over_ranks([flat, moments])
        return batches, cut_moments

    def _decompose(self, s: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The rotations T, in batches like the Gram matrices, and s' of every layer in batches like `s`.

        Each process computes a share and receives the rest.
        """
        grams = self._grams.batches
        flat, made = _zeros([*(batch.shape for batch in grams), *self._shapes], self._grams.device)
        turns, values = made[: len(grams)], made[len(grams) :]
        for batch, (layers, of_u, of_v) in enumerate(self._shares):
            t_u, new, t_v = rotations(grams[batch][of_u], s[batch][layers], grams[batch][of_v])
            turns[batch][of_u], values[batch][layers], turns[batch][of_v] = t_u, new, t_v
        dist.all_reduce(flat)
        if not flat.isfinite().all():
            lost = torch.cat([found.isnan().any(1) for found in values]).tolist()
            names = [name for name, is_lost in zip(self._layers, lost, strict=True) if is_lost]
            told = ", ".join([*dict.fromkeys(names)][:3])
            raise ValueError(
                f"regularizer.reorthonormalize: the columns of U or V of {told} ({len(names)} matrices) "
                "depend on each other, or hold NaN or Inf; lower train.learning_rate"
            )
        return turns, values

    def _first_moment(self, fragment: Fragment) -> Tensor:
        """AdamW's running mean of a fragment's gradients, a 1-D view."""
        return fragment.within(self._state[fragment.master]["exp_avg"])


def _pieces(fragment: Fragment, first: int) -> Iterator[tuple[int, slice, slice]]:
    """A fragment of s by layer: (number of the layer, range of its s, range of the fragment).

    Args:
        first: number of the first layer of the fragment's tensor, which has one row for each expert, or one alone.
    """
    rank = fragment.shape[-1]
    position, end = fragment.start, fragment.start + fragment.numel
    while position < end:
        row, column = divmod(position, rank)
        stop = min(end, (row + 1) * rank)
        here = position - fragment.start
        yield first + row, slice(column, column + stop - position), slice(here, here + stop - position)
        position = stop


def _zeros(shapes: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """A flat float64 tensor of zeros, and views into it with the given shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    return flat, [part.view(*shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
