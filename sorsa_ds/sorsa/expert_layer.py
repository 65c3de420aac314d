"""SorsaExperts: the adapted weights of all experts of a layer, their forward and their backward pass.

For each expert e, a linear as in `sorsa_ds.sorsa.layer` (SORSA, eq. 8), over the rows that are routed to it:

    y_e = x_e W_r,e^T + (x_e V_e) (scale * U_e diag(s_e))^T

Shapes, used as suffixes of tensor names: E experts; S rows, sorted by expert (`sorsa_ds.sorsa.routes`); M out_features,
N in_features, R rank.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sorsa_ds.sorsa.layer import compute_dtype
from sorsa_ds.sorsa.residual_storage import Dense, Storage
from sorsa_ds.sorsa.routes import Routes
from sorsa_ds.sorsa.sides import KeptSides, Sides, at_hand, left_gradients

DENSE_BYTES = 2**30
"""Bytes of packed residuals that are dense at once: as many experts as fit, and at least one."""


class _ExpertsFunction(torch.autograd.Function):
    """The forward and backward of all experts, without ever forming a product U_e diag(s_e) V_e^T.

    As in the function of a single linear, parameters are saved as they are, since ZeRO-3 frees and re-gathers their
    storage between forward and backward, and a packed residual is made dense in both passes.
    """

    @staticmethod
    def forward(ctx, x, x_principal, routes, U_EMR, s_ER, V_ENR, left, right, scale, storage, *residual):
        dtype = compute_dtype(x)
        sides = Sides.taken(left, right, U_EMR, s_ER, V_ENR, scale, dtype)
        x_SN = x.to(dtype)
        p_SN = x_SN if x_principal is None else x_principal.to(dtype)
        z_SR = routes.times(p_SN, sides.right.mT)
        shape = U_EMR.shape[1], V_ENR.shape[1]
        y_SM = _residual_product(routes, x_SN, storage, residual, shape, turned=False)
        y_SM += routes.times(z_SR, sides.left)
        kept_p = p_SN if ctx.needs_input_grad[5] else None
        ctx.save_for_backward(kept_p, z_SR, U_EMR, s_ER, V_ENR, left, right, *residual)
        ctx.routes, ctx.scale, ctx.storage = routes, scale, storage
        ctx.dtype, ctx.x_dtype, ctx.one_input = dtype, x.dtype, x_principal is None
        return y_SM

    @staticmethod
    def backward(ctx, grad_y):
        p_SN, z_SR, U_EMR, s_ER, V_ENR, left, right, *residual = ctx.saved_tensors
        routes, dtype, needs = ctx.routes, ctx.dtype, ctx.needs_input_grad
        sides = Sides.taken(left, right, U_EMR, s_ER, V_ENR, ctx.scale, dtype)
        g_SM = grad_y.to(dtype).contiguous()
        h_SR = routes.times(g_SM, sides.left.mT)

        grad_U = grad_s = grad_V = grad_x = grad_p = None
        if needs[3] or needs[4]:
            grad_U, grad_s = left_gradients(routes.outer(g_SM, z_SR), U_EMR, s_ER, ctx.scale)
        if needs[5]:
            grad_V = routes.outer(p_SN, h_SR).to(V_ENR.dtype)
        if needs[0]:
            shape = U_EMR.shape[1], V_ENR.shape[1]
            grad_x = _residual_product(routes, g_SM, ctx.storage, residual, shape, turned=True)
        if needs[0] if ctx.one_input else needs[1]:
            through = routes.times(h_SR, sides.right)
            if ctx.one_input:
                grad_x += through
            else:
                grad_p = through.to(ctx.x_dtype)
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype)
        return grad_x, grad_p, None, grad_U, grad_s, grad_V, *(None for _ in range(4 + len(residual)))


def _residual_product(
    routes: Routes, x: Tensor, storage: Storage, kept: Sequence[Tensor], shape: tuple[int, int], turned: bool
) -> Tensor:
    """x_e W_r,e^T for each expert, or x_e W_r,e where `turned`; packed residuals are made dense a few at a time.

    Args:
        shape: (M, N).
    """
    if not storage.quantised:
        [W_EMN] = kept
        W_EMN = W_EMN.to(x.dtype)
        return routes.times(x, W_EMN.mT if turned else W_EMN)
    y = x.new_empty(len(x), shape[1 if turned else 0])
    for first, end in _chunks(len(kept[0]), shape[0] * shape[1] * x.element_size()):
        # Where all experts fit at once, nothing has to be known of their rows, and the device is not waited for.
        own, rows = (routes, slice(None)) if end - first == len(kept[0]) else routes.part(first, end)
        if len(own.expert):
            W_EMN = dense_stack(storage, [tensor[first:end] for tensor in kept], shape, x.dtype)
            y[rows] = own.times(x[rows], W_EMN.mT if turned else W_EMN)
            del W_EMN  # before the next ones are made
    return y


def _chunks(experts: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of experts whose dense matrices, of `nbytes` each, are made together."""
    step = dense_together(experts, nbytes)
    for first in range(0, experts, step):
        yield first, min(first + step, experts)


def dense_together(experts: int, nbytes: int) -> int:
    """How many experts' packed residuals are dense at once: as many matrices of `nbytes` as fit into `DENSE_BYTES`."""
    return min(experts, max(1, DENSE_BYTES // nbytes))


def dense_stack(storage: Storage, kept: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrices (E, M, N) that packed tensors stand for, in a dtype.

    Args:
        shape: (M, N).
    """
    experts = len(kept[0])
    if storage.joins(shape[0] * shape[1]):
        joined = [tensor.reshape(-1, *tensor.shape[2:]) for tensor in kept]
        return storage.dense(joined, (experts * shape[0], shape[1]), dtype).view(experts, *shape)
    dense = kept[0].new_empty(experts, *shape, dtype=dtype)
    for expert, matrix in enumerate(dense):
        matrix.copy_(storage.dense([tensor[expert] for tensor in kept], shape, dtype))
    return dense


class SorsaExperts(nn.Module):
    """The weights of E experts, each W_e = W_r,e + scale * U_e diag(s_e) V_e^T with frozen W_r,e (SORSA, eq. 8).

    Its trainable parameters are `U` (E, M, R), `s` (E, R) and `V` (E, N, R). Frozen are the tensors of the residuals,
    those of `sorsa_ds.sorsa.layer.SorsaLinear` with E before their shapes.

    Args:
        experts: E.
        in_features, out_features: N and M.
        rank: R, 1 <= R <= min(M, N).
        scale: factor on U diag(s) V^T: alpha / rank, or 1 as in the papers.
        dropout: dropout probability on the principal branch's input, in training.
        device: where the tensors are made, uninitialised; `meta` for the streaming loader.
        storage: how each W_r,e is stored.
        factor_dtype: dtype of U, s and V.

    Raises:
        ValueError: the rank is not in 1 .. min(M, N).
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        storage: Storage = Dense(torch.float32),  # noqa: B008 (it is immutable)
        factor_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is not in 1 .. {min(in_features, out_features)} = min(out, in)")
        self.experts, self.in_features, self.out_features, self.rank = experts, in_features, out_features, rank
        self.scale, self.dropout, self.storage = scale, dropout, storage
        self.kept_sides: KeptSides | None = None

        def empty(*shape: int, dtype: torch.dtype, trainable: bool) -> nn.Parameter:
            """An uninitialised parameter of all experts."""
            return nn.Parameter(torch.empty(experts, *shape, device=device, dtype=dtype), requires_grad=trainable)

        for name, (shape, dtype) in storage.tensors(torch.Size((out_features, in_features))).items():
            self.register_parameter(name, empty(*shape, dtype=dtype, trainable=False))
        self.U = empty(out_features, rank, dtype=factor_dtype, trainable=True)
        self.s = empty(rank, dtype=factor_dtype, trainable=True)
        self.V = empty(in_features, rank, dtype=factor_dtype, trainable=True)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """Map rows x (S, N) to y (S, M), each by its expert's weight."""
        x_principal = nn.functional.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        residual = (getattr(self, name) for name in self.storage.names)
        left, right, _ = at_hand(self, compute_dtype(x))
        return _ExpertsFunction.apply(
            x, x_principal, routes, self.U, self.s, self.V, left, right, self.scale, self.storage, *residual
        )

    def extra_repr(self) -> str:
        """The shape, as `print(model)` shows it."""
        return f"experts={self.experts}, in={self.in_features}, out={self.out_features}, rank={self.rank}"
