"""The (r, r) matrices that make U and V orthonormal without changing U diag(s) V^T, for many layers in one batch.

The mathematics stands in `sorsa_ds.engine.reorthonormalize`, which applies them to the sharded factors. Shapes: L is
the number of layers in a batch, all of one rank r.

The singular value decomposition A diag(s') B^T of the core C_U diag(s) C_V^T is taken from the eigenvectors of
core core^T, which takes half the time of LAPACK's SVD and, on GPUs, runs as one batch where an SVD of more than 32
columns goes matrix after matrix:

    core core^T = A diag(lambda) A^T,   A^T core = diag(s') B^T      rows of A^T core, each divided by its norm s'

A is orthonormal and A diag(s') B^T is the core, both to rounding. Forming core core^T loses part of B's orthonormality:
columns i and j keep a product of about 1e-16 s_max^2 / (s_i s_j). One Newton-Schulz step takes B to its polar factor,
which squares that, and moves the core by s_i times it. Where either would be more than rounding, as where some s are
zero or a thousand times smaller than others, the matrix gets an SVD of its own instead.
"""

import torch
from torch import Tensor

NEAR, MOVED = 1e-7, 1e-12
"""The largest |B^T B - I| that one Newton-Schulz step takes to rounding, and the largest |(B^T B - I) diag(s')| / s_max
by which that step may move the core. The masters are fp32, whose rounding is 6e-8."""

CHUNK_NUMBERS = 2**22
"""Numbers of each (L, r, r) float64 tensor at a time, 32 MiB; there are about a dozen such tensors at once."""


def rotations(gram_u: Tensor, s: Tensor, gram_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T_U, s' and T_V with U T_U and V T_V orthonormal and U T_U diag(s') T_V^T V^T = U diag(s) V^T, for each layer.

    Args:
        gram_u: U^T U (L, r, r), float64; so are the others, on the same device.
        s: (L, r).
        gram_v: V^T V (L, r, r).

    Returns:
        T_U (L, r, r), s' (L, r) and T_V (L, r, r); NaN for a layer in which a column of U or V depends on the others,
        or a value is NaN or Inf.
    """
    size = max(1, CHUNK_NUMBERS // max(1, s.shape[-1] ** 2))
    parts = [_rotations(*chunk) for chunk in zip(gram_u.split(size), s.split(size), gram_v.split(size), strict=True)]
    t_u, values, t_v = (torch.cat(found) for found in zip(*parts, strict=True))
    return t_u, values, t_v


def _rotations(gram_u: Tensor, s: Tensor, gram_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    (c_u, bad_u), (c_v, bad_v) = (torch.linalg.cholesky_ex(gram, upper=True) for gram in (gram_u, gram_v))
    core = (c_u * s[:, None, :]) @ c_v.mT
    lost = (bad_u != 0) | (bad_v != 0) | ~core.isfinite().all(-1).all(-1)
    # Decompositions stop at NaN, so that a lost layer is computed as the identity and marked at the end.
    c_u, core, c_v = (torch.where(lost[:, None, None], eye, x) for x in (c_u, core, c_v))
    a, values, b = _singular(core, eye)
    t_u = torch.linalg.solve_triangular(c_u, a, upper=True)
    t_v = torch.linalg.solve_triangular(c_v, b, upper=True)
    order = _nearest(t_u.square() + t_v.square())
    t_u, t_v = (t.gather(2, order[:, None, :].expand_as(t)) for t in (t_u, t_v))
    values = values.gather(1, order)
    sign_u, sign_v = (torch.where(t.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(t) for t in (t_u, t_v))
    values = values * sign_u * sign_v
    t_u, t_v = t_u * sign_u[:, None, :], t_v * sign_v[:, None, :]
    nan = s.new_tensor(torch.nan)
    return (
        torch.where(lost[:, None, None], nan, t_u),
        torch.where(lost[:, None], nan, values),
        torch.where(lost[:, None, None], nan, t_v),
    )


def _singular(core: Tensor, eye: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (L, r, r), s' (L, r) and B (L, r, r) of core = A diag(s') B^T, in no order; see the module's docstring."""
    scale = core.abs().amax((-2, -1), keepdim=True)
    core = core / torch.where(scale > 0, scale, 1.0)  # so that squares neither overflow nor vanish
    _, a = torch.linalg.eigh(core @ core.mT)
    rows = a.mT @ core
    values = torch.linalg.vector_norm(rows, dim=-1)
    b = (rows / values[..., None]).mT
    gram = b.mT @ b
    error = (gram - eye).abs()
    moved = (error * values[:, None, :]).amax((-2, -1)) / values.amax(-1)
    near = (error.amax((-2, -1)) <= NEAR) & (moved <= MOVED)  # False for NaN, from a zero s'
    b = b @ (1.5 * eye - 0.5 * gram)
    if not near.all():
        a[~near], values[~near], b_t = torch.linalg.svd(core[~near])
        b[~near] = b_t.mT
    return a, values * scale[..., 0], b


def _nearest(likeness: Tensor) -> Tensor:
    """The new column for each old one (a row of `likeness`, (L, r, r)): the most similar pair first, then that of the
    rest; (L, r).

    A pair that is the most similar of both its row and its column is taken sooner or later whatever else is taken
    before it, so all such pairs are taken at once. Columns that hardly moved are all taken in the first round.
    """
    left, r = likeness.clone(), likeness.shape[-1]
    order = torch.full(likeness.shape[:2], -1, device=likeness.device)
    rows = torch.arange(r, device=likeness.device).expand_as(order)
    while True:
        new, old = left.argmax(2), left.argmax(1)
        taken = (order < 0) & (old.gather(1, new) == rows)
        order = torch.where(taken, new, order)
        if (order >= 0).all():
            return order
        # Column r stands for none.
        gone = torch.zeros(len(order), r + 1, dtype=torch.bool, device=order.device)
        gone.scatter_(1, torch.where(order < 0, r, order), True)
        left.masked_fill_((order >= 0)[:, :, None], -1.0).masked_fill_(gone[:, None, :r], -1.0)
