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

from collections.abc import Iterator, Mapping

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
    matrices.

    Args:
        grams: Gram matrices of U and V.
        masters: this rank's fragments.
        state: the state of the inner optimizer: master -> its moments.
    """

    def __init__(self, grams: ShardedGrams, masters: Masters, state: Mapping[Tensor, dict[str, Tensor]]):
        self._grams, self._state = grams, state
        self._layers: list[str] = []
        self._pairs: list[tuple[int, int]] = []
        first: dict[str, int] = {}
        for name in grams.names:
            if name.endswith(".U"):
                layer = name.removesuffix(".U")
                of_u, of_v = (range(len(grams.grams))[grams.spans[f"{layer}.{side}"]] for side in "UV")
                first[f"{layer}.s"] = len(self._layers)
                self._pairs += zip(of_u, of_v, strict=True)
                self._layers += [layer] * len(of_u)
        self._s = [(first[f.name], f) for f in masters.fragments if f.name in first]

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
                for span, turned in part.times(numbers, cut_rows, torch.stack(turns[part.numbers])):
                    numbers[span] = turned.to(numbers)
        for first, fragment in self._s:
            for layer, there, here in _pieces(fragment, first):
                fragment.values()[here] = values[layer][there].to(fragment.values())

    def _shared(self) -> tuple[list[Tensor], list[Tensor]]:
        """s of every layer, and the first moments of the cut rows; float64. A rank alone knows only parts of them."""
        flat, s = _zeros([self._grams.grams[u][0] for u, _ in self._pairs])
        for first, fragment in self._s:
            for layer, there, here in _pieces(fragment, first):
                s[layer][there] = fragment.values()[here].to(s[layer])
        moments, cut_moments = self._grams.own_cut_rows(self._first_moment)
        if self._grams.sharded:
            collectives.sum_over_ranks([flat, moments])
        return s, cut_moments

    def _decompose(self, s: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The rotation T of every matrix, and s' of every layer. Each rank computes a share and receives the rest."""
        grams = self._grams.grams
        flat, made = _zeros([*grams, *s])
        turns, values = made[: len(grams)], made[len(grams) :]
        for layer in range(collectives.rank(), len(self._pairs), collectives.world_size()):
            u, v = self._pairs[layer]
            found = rotations(grams[u].cpu(), s[layer].cpu(), grams[v].cpu())
            if found is None:
                values[layer].fill_(torch.nan)  # the sum over the ranks shows it to every rank
            else:
                for place, tensor in zip((turns[u], values[layer], turns[v]), found, strict=True):
                    place.copy_(tensor)
        dist.all_reduce(flat)
        if not flat.isfinite().all():
            lost = [name for name, found in zip(self._layers, values, strict=True) if found.isnan().any()]
            told = ", ".join([*dict.fromkeys(lost)][:3])
            raise ValueError(
                f"regularizer.reorthonormalize: the columns of U or V of {told} ({len(lost)} matrices) "
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


def _zeros(like: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A flat tensor of zeros, and views into it with the shapes of the given tensors."""
    flat = like[0].new_zeros(sum(map(Tensor.numel, like)))
    return flat, [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in like]), like, strict=True)]
