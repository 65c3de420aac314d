"""The (r, r) matrices that make U and V orthonormal without changing U diag(s) V^T.

The mathematics stands in `sorsa_ds.engine.reorthonormalize`, which applies them to the sharded factors.
"""

import torch
from torch import Tensor


def rotations(gram_u: Tensor, s: Tensor, gram_v: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """T_U (r, r), s' (r,) and T_V (r, r) with U T_U and V T_V orthonormal and U T_U diag(s') T_V^T V^T = U diag(s) V^T.

    Args:
        gram_u: U^T U (r, r), float64 on the CPU; so are the others.
        s: (r,).
        gram_v: V^T V (r, r).

    Returns:
        The three tensors; None where a column of U or V depends on the others, or a value is NaN or Inf.
    """
    (c_u, bad_u), (c_v, bad_v) = (torch.linalg.cholesky_ex(gram, upper=True) for gram in (gram_u, gram_v))
    core = (c_u * s) @ c_v.T
    if bad_u or bad_v or not core.isfinite().all():
        return None
    a, values, b_t = torch.linalg.svd(core)
    t_u = torch.linalg.solve_triangular(c_u, a, upper=True)
    t_v = torch.linalg.solve_triangular(c_v, b_t.T, upper=True)
    order = _nearest(t_u.square() + t_v.square())
    t_u, values, t_v = t_u[:, order], values[order], t_v[:, order]
    sign_u, sign_v = (torch.where(t.diagonal() < 0, -1.0, 1.0).double() for t in (t_u, t_v))
    return t_u * sign_u, values * sign_u * sign_v, t_v * sign_v


def _nearest(likeness: Tensor) -> Tensor:
    """The new column for each old one (a row of `likeness`): the most similar pair first, then that of the rest."""
    left, r = likeness.clone(), len(likeness)
    order = torch.empty(r, dtype=torch.long)
    for _ in range(r):
        old, new = divmod(int(left.argmax()), r)
        order[old] = new
        left[old] = left[:, new] = -1.0
    return order
