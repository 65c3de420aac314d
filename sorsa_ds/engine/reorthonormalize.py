"""U and V made orthonormal again, exactly, without changing what the layer computes.

Of a layer's U (m, r), s (r), V (n, r) only the Gram matrices are needed:

    U^T U = C_U^T C_U,  V^T V = C_V^T C_V       Cholesky
    C_U diag(s) C_V^T = A diag(s') B^T          singular value decomposition, (r, r)
    U' = U T_U,  T_U = C_U^-1 A,   V' = V T_V,  T_V = C_V^-1 B

Then U' diag(s') V'^T = U diag(s) V^T and U'^T U' = V'^T V' = I. That leaves the order and the signs of the columns
free. They are taken so that T_U and T_V are as near the identity as they can be: a column that has drifted a little
moves a little. (A negative s_i stays negative.) Only columns whose singular values lie closer together than U and V
have drifted from orthonormality turn among themselves, as they must.

AdamW's moments belong to columns. The first moment of U is multiplied by T_U, that of V by T_V. It is a mean of U's
gradients G V diag(s), G being the weight's, so the mean that U' would have had is exp_avg diag(1/s) T_V diag(s'). Where
columns turn among themselves, their s are equal but for the drift, and T_U and T_V are one rotation: exp_avg T_U is
that but for the drift, and divides by no s. Left as it is, it would belong to columns that are gone. The second moment
is a mean of squares, which no matrix turns; columns that turn have like s, hence gradients of like size: it stays. So
do both of s, which are numbers of their own.
"""

from collections.abc import Mapping

import torch
from deepspeed import comm as dist
from torch import Tensor

from sorsa_ds.engine.grams import ShardedGrams
from sorsa_ds.engine.masters import Fragment, Masters
from sorsa_ds.runtime import collectives
from sorsa_ds.sorsa.rotations import rotations


class Reorthonormalizer:
    """Replaces the factors of all layers on the masters, wherever ZeRO has put them.

    A factor is only multiplied from the right, so its rows stay where they are. Over the wire go the Gram matrices, s,
    the cut rows, and the rotations: one rank decomposes a layer, so that all turn by the same matrices, to the bit.

    Args:
        grams: of U and V.
        masters: this rank's fragments.
        state: the inner optimizer's, by master.
    """

    def __init__(self, grams: ShardedGrams, masters: Masters, state: Mapping[Tensor, dict[str, Tensor]]):
        self._grams, self._state = grams, state
        matrix = {name: i for i, name in enumerate(grams.names)}
        self._layers = [name.removesuffix(".U") for name in grams.names if name.endswith(".U")]
        self._pairs = [(matrix[f"{layer}.U"], matrix[f"{layer}.V"]) for layer in self._layers]
        number = {f"{layer}.s": i for i, layer in enumerate(self._layers)}
        self._s = [(number[f.name], f) for f in masters.fragments if f.name in number]

    @torch.no_grad()
    def apply(self) -> None:
        """Do it once, between the optimizer's step and the copy into the model. A collective call.

        Raises:
            ValueError: a U or V has no full rank any more, or holds what is no number; on every rank.
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
                for span, turned in part.times(numbers, cut_rows[part.matrix], turns[part.matrix]):
                    numbers[span] = turned.to(numbers)
        for layer, fragment in self._s:
            fragment.values().copy_(values[layer][fragment.start : fragment.start + fragment.numel])

    def _shared(self) -> tuple[list[Tensor], list[Tensor]]:
        """What ranks know only in part: s of every layer, and the first moments of the cut rows; float64."""
        flat, s = _zeros([self._grams.grams[u][0] for u, _ in self._pairs])
        for layer, fragment in self._s:
            s[layer][fragment.start : fragment.start + fragment.numel] = fragment.values()
        moments, cut_moments = self._grams.own_cut_rows(self._first_moment)
        if self._grams.sharded:
            collectives.sum_over_ranks([flat, moments])
        return s, cut_moments

    def _decompose(self, s: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """T of every matrix and s' of every layer; this rank makes its share of them."""
        grams = self._grams.grams
        flat, made = _zeros([*grams, *s])
        turns, values = made[: len(grams)], made[len(grams) :]
        for layer in range(collectives.rank(), len(self._pairs), collectives.world_size()):
            u, v = self._pairs[layer]
            found = rotations(grams[u].cpu(), s[layer].cpu(), grams[v].cpu())
            if found is None:
                values[layer].fill_(torch.nan)  # every rank will see it
            else:
                for place, tensor in zip((turns[u], values[layer], turns[v]), found, strict=True):
                    place.copy_(tensor)
        dist.all_reduce(flat)
        if not flat.isfinite().all():
            lost = [name for name, found in zip(self._layers, values, strict=True) if found.isnan().any()]
            raise ValueError(
                f"regularizer.reorthonormalize: the columns of U or V of {', '.join(lost[:3])} ({len(lost)} linears) "
                f"depend on each other, or are no numbers; lower train.learning_rate"
            )
        return turns, values

    def _first_moment(self, fragment: Fragment) -> Tensor:
        return fragment.within(self._state[fragment.master]["exp_avg"])


def _zeros(like: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Zeros in one flat tensor, and its views of the given shapes."""
    flat = like[0].new_zeros(sum(map(Tensor.numel, like)))
    return flat, [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in like]), like, strict=True)]
