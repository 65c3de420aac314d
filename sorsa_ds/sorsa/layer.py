"""SorsaLinear: one adapted linear layer, its forward and its backward pass (SORSA, eq. 8).

    y = x W_r^T + (x V) (scale * U diag(s))^T + bias

Shapes, used as suffixes of tensor names: T tokens (all leading dimensions of x), M out_features, N in_features,
R rank. The residual W_r and the bias are frozen; U, s and V are trained.
"""

import torch
from torch import Tensor, nn

from sorsa_ds.sorsa.residual_storage import Dense, Storage
from sorsa_ds.sorsa.sides import KeptSides, Sides, at_hand, joined_gradients, left_gradients


class _SorsaFunction(torch.autograd.Function):
    """The layer's forward and backward without ever forming the (M, N) product left right^T.

    Of the tensors that scale with the tokens only x and x V are kept for the backward pass. Parameters are saved as
    they are: ZeRO-3 frees and re-gathers their storage between forward and backward, and a saved cast or view would
    keep that storage alive. For the same reason a packed residual is made dense in the forward pass and again in the
    backward pass, and the dense matrix is not kept; nor are the sides, unless the layer keeps them anyway.
    """

    @staticmethod
    def forward(ctx, x, x_principal, U_MR, s_R, V_NR, bias_M, left, right, rates, scale, storage, *residual):
        dtype = compute_dtype(x)
        sides = Sides.taken(left, right, U_MR, s_R, V_NR, scale, dtype)
        x_TN = x.reshape(-1, x.shape[-1]).to(dtype)
        p_TN = x_TN if x_principal is None else x_principal.reshape(-1, x.shape[-1]).to(dtype)
        z_TR = p_TN @ sides.right
        y_TM = storage.linear(residual, x_TN, len(U_MR), None if bias_M is None else bias_M.to(dtype))
        y_TM.addmm_(z_TR, sides.left.t())
        # Under autocast x may have a wider dtype than what was multiplied; the narrower copy is kept.
        kept_p = p_TN if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(kept_p, z_TR, U_MR, s_R, V_NR, left, right, rates, *residual)
        ctx.scale, ctx.storage, ctx.dtype = scale, storage, dtype
        ctx.x_shape, ctx.x_dtype, ctx.one_input = x.shape, x.dtype, x_principal is None
        # A view made in here could not be written to, which some models do with what a linear returns. This is none.
        return torch.ops.aten._unsafe_view(y_TM, [*x.shape[:-1], len(U_MR)])

    @staticmethod
    def backward(ctx, grad_y):
        p_TN, z_TR, U_MR, s_R, V_NR, left, right, rates, *residual = ctx.saved_tensors
        dtype, scale, needs = ctx.dtype, ctx.scale, ctx.needs_input_grad
        sides = Sides.taken(left, right, U_MR, s_R, V_NR, scale, dtype)
        g_TM = grad_y.reshape(-1, grad_y.shape[-1]).to(dtype)
        h_TR = g_TM @ sides.left

        grad_U = grad_s = grad_V = grad_x = grad_p = None
        if rates is not None and all(needs[2:5]):
            grad_U, grad_s, grad_V = joined_gradients(g_TM, z_TR, p_TN, h_TR, U_MR, s_R, scale, rates)
        else:
            if needs[2] or needs[3]:
                grad_U, grad_s = left_gradients(g_TM.t() @ z_TR, U_MR, s_R, scale)
            if needs[4]:
                grad_V = (p_TN.t() @ h_TR).to(V_NR.dtype)
        if needs[0]:
            grad_x = g_TM @ ctx.storage.dense(residual, (len(U_MR), len(V_NR)), dtype)
        if needs[0] if ctx.one_input else needs[1]:
            if ctx.one_input:
                grad_x.addmm_(h_TR, sides.right.t())
            else:
                grad_p = (h_TR @ sides.right.t()).view(ctx.x_shape).to(ctx.x_dtype)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        return grad_x, grad_p, grad_U, grad_s, grad_V, *(None for _ in range(6 + len(residual)))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where autocast is on, else the input's."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class WeightFacts:
    """What may be asked of the weight of an adapted linear, which as a matrix does not exist.

    The attributes are those of a tensor: dtype, device, shape (M, N), ndim, requires_grad. Everything else raises a
    ValueError, since it would read numbers.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: torch.Size):
        self.dtype, self.device, self.shape, self.ndim, self.requires_grad = dtype, device, shape, 2, False

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._unreadable(f"{tuple(self.shape)}: .{name}")

    def __getitem__(self, part):
        raise self._unreadable(f"{tuple(self.shape)}: [...]")

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        raise cls._unreadable(getattr(function, "__name__", str(function)))

    @staticmethod
    def _unreadable(what: str) -> ValueError:
        return ValueError(
            f"the model reads the weight of an adapted linear without calling it ({what}), so this linear cannot be "
            f"adapted: leave it out by adapter.exclude"
        )


class SorsaLinear(nn.Module):
    """A linear layer W = W_r + scale * U diag(s) V^T with frozen W_r (SORSA, eq. 8).

    Its trainable parameters are `U` (M, R), `s` (R,) and `V` (N, R). Frozen are the tensors of the residual, which are
    named by its storage (one tensor `residual` (M, N) where it is not packed), and `bias` (M,), which may be None.
    U and V are both stored with the long dimension first, so that a flat ZeRO partition is a block of rows.

    Args:
        in_features, out_features: N and M.
        rank: R, 1 <= R <= min(M, N).
        bias: whether the layer has a bias.
        scale: factor on U diag(s) V^T: alpha / rank, or 1 as in the papers.
        dropout: dropout probability on the principal branch's input, in training.
        device: where the tensors are made, uninitialised; `meta` for the streaming loader.
        storage: how W_r is stored.
        factor_dtype: dtype of U, s and V.
        bias_dtype: dtype of the bias.

    Raises:
        ValueError: the rank is not in 1 .. min(M, N).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        storage: Storage = Dense(torch.float32),  # noqa: B008 (it is immutable)
        factor_dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is not in 1 .. {min(in_features, out_features)} = min(out, in)")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.scale, self.dropout, self.storage = scale, dropout, storage
        self.kept_sides: KeptSides | None = None

        def empty(*shape: int, dtype: torch.dtype, trainable: bool) -> nn.Parameter:
            """An uninitialised parameter."""
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=trainable)

        for name, (shape, dtype) in storage.tensors(torch.Size((out_features, in_features))).items():
            self.register_parameter(name, empty(*shape, dtype=dtype, trainable=False))
        self.U = empty(out_features, rank, dtype=factor_dtype, trainable=True)
        self.s = empty(rank, dtype=factor_dtype, trainable=True)
        self.V = empty(in_features, rank, dtype=factor_dtype, trainable=True)
        self.bias = empty(out_features, dtype=bias_dtype, trainable=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., N) to y (..., M)."""
        x_principal = nn.functional.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        residual = (getattr(self, name) for name in self.storage.names)
        kept = at_hand(self, compute_dtype(x))
        return _SorsaFunction.apply(
            x, x_principal, self.U, self.s, self.V, self.bias, *kept, self.scale, self.storage, *residual
        )

    @property
    def weight(self) -> WeightFacts:
        """What a model may ask of the weight: its dtype, device and shape, but none of its numbers."""
        first = getattr(self, self.storage.names[0])
        dtype = first.dtype if first.is_floating_point() else self.U.dtype
        return WeightFacts(dtype, first.device, torch.Size((self.out_features, self.in_features)))

    def extra_repr(self) -> str:
        """The layer's shape, as `print(model)` shows it."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
