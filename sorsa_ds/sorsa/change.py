"""The change of a weight since training began, as a product of rank 2 R that is never formed (SORSA, eq. 8).

    W - W_0 = scale * (U diag(s) V^T - U_0 diag(s_0) V_0^T),   y = x (W - W_0)^T

A layer that adds y to what its base layer computes is a SORSA layer over any base weight, which stays as it is: without
y it is the base layer again, bit for bit, and several such changes add up. The two products nearly cancel, so both are
summed in one matrix product, whose sums are wider than bf16: at step 0 nothing is left but the rounding of these.

Shapes, used as suffixes of tensor names: T tokens (all leading dimensions of x), M out_features, N in_features, R rank,
K = 2 R.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sorsa_ds.sorsa.decompose import Factors
from sorsa_ds.sorsa.layer import compute_dtype
from sorsa_ds.sorsa.sides import Sides, left_gradients


class _ChangeFunction(torch.autograd.Function):
    """Forward and backward of the change. Only x and the trained half of x [V, V_0] are kept of what scales with T.

    As in `sorsa_ds.sorsa.layer`, the factors are saved as they are, and the sides are made again for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x, x_principal, U_MR, s_R, V_NR, U_0, s_0, V_0, scale) -> Tensor:
        dtype = compute_dtype(x)
        now, begun = _both((U_MR, s_R, V_NR), (U_0, s_0, V_0), scale, dtype)
        x_TN = x.reshape(-1, x.shape[-1]).to(dtype)
        if x_principal is None:
            p_TN, z_TK = x_TN, x_TN @ torch.cat([now.right, begun.right], 1)
        else:
            p_TN = x_principal.reshape(-1, x.shape[-1]).to(dtype)
            z_TK = torch.cat([p_TN @ now.right, x_TN @ begun.right], 1)
        y_TM = z_TK @ torch.cat([now.left, -begun.left], 1).t()
        kept_p = p_TN if ctx.needs_input_grad[4] else None
        kept_z = z_TK[:, : len(s_R)].clone() if ctx.needs_input_grad[2] or ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept_p, kept_z, U_MR, s_R, V_NR, U_0, s_0, V_0)
        ctx.scale, ctx.dtype, ctx.one_input = scale, dtype, x_principal is None
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return y_TM.view(*x.shape[:-1], len(U_MR))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        p_TN, z_TR, U_MR, s_R, V_NR, *begin = ctx.saved_tensors
        needs = ctx.needs_input_grad
        now, begun = _both((U_MR, s_R, V_NR), begin, ctx.scale, ctx.dtype)
        g_TM = grads[0].reshape(-1, grads[0].shape[-1]).to(ctx.dtype)
        h_TR = g_TM @ now.left

        grad_U = grad_s = grad_V = grad_x = grad_p = None
        if needs[2] or needs[3]:
            grad_U, grad_s = left_gradients(g_TM.t() @ z_TR, U_MR, s_R, ctx.scale)
        if needs[4]:
            grad_V = (p_TN.t() @ h_TR).to(V_NR.dtype)
        if needs[0]:
            h_0 = g_TM @ -begun.left
            if ctx.one_input:
                grad_x = torch.cat([h_TR, h_0], 1) @ torch.cat([now.right, begun.right], 1).t()
            else:
                grad_x = h_0 @ begun.right.t()
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        if needs[1]:
            grad_p = (h_TR @ now.right.t()).view(ctx.x_shape).to(ctx.x_dtype)
        return grad_x, grad_p, grad_U, grad_s, grad_V, None, None, None, None


def _both(now: Sequence[Tensor], begun: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Sides, Sides]:
    """The sides of the product now and of that with which training began, which is rounded as the trained factors are.

    Where a program has rounded the trained factors alone, as TRL does over a 4-bit base, the two cancel all the same.
    """
    U, s, V = now
    U_0, s_0, V_0 = (factor.to(U.dtype) for factor in begun)
    return Sides.of(U, s, V, scale, dtype), Sides.of(U_0, s_0, V_0, scale, dtype)


def apply_change(x: Tensor, now: Factors, begun: Factors, scale: float = 1.0, dropout: float = 0.0) -> Tensor:
    """x (W - W_0)^T, (..., M) in the dtype of the products: that of autocast where it is on, else that of x.

    Args:
        x: (..., N), in the dtype of the factors where autocast is off.
        now: the trained U (M, R), s (R,) and V (N, R).
        begun: the frozen U_0 (M, R), s_0 (R,) and V_0 (N, R) with which training began.
        dropout: dropout probability on the input of the trained product; 0 outside of training.
    """
    x_principal = torch.nn.functional.dropout(x, dropout) if dropout > 0 else None
    return _ChangeFunction.apply(x, x_principal, *now.tensors(), *begun.tensors(), scale)


@torch.no_grad()
def dense_change(now: Factors, begun: Factors, scale: float = 1.0) -> Tensor:
    """W - W_0 as a matrix (M, N), in fp32 or wider and without a gradient."""
    wide = torch.promote_types(now.U.dtype, torch.float32)
    after, before = _both(now.tensors(), begun.tensors(), scale, wide)
    return torch.cat([after.left, -before.left], 1) @ torch.cat([after.right, before.right], 1).t()
