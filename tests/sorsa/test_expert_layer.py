"""The adapted weights of experts: their numbers and gradients in each form against one linear for each expert."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sorsa_ds.sorsa import expert_layer
from sorsa_ds.sorsa.expert_layer import SorsaExperts, dense_stack
from sorsa_ds.sorsa.packed_storage import Int8, Nf4, Nf4Double
from sorsa_ds.sorsa.residual_storage import Dense, Storage
from sorsa_ds.sorsa.routes import Form, Routes

EXPERTS, IN, OUT, RANK = 5, 24, 16, 8
CHOSEN = torch.tensor([[4, 0], [0, 1], [4, 1], [0, 4], [0, 2], [1, 0], [4, 2]])
"""Expert 3 gets no token."""


def pack_stack(storage: Storage, matrices: Tensor) -> list[Tensor]:
    """Each matrix packed by itself, as `sorsa_ds.model.sorsa_recipe` does it."""
    return [torch.stack(tensors) for tensors in zip(*map(storage.pack, matrices), strict=True)]


def experts(dtype: torch.dtype, storage: Storage | None = None, rank: int = RANK, **settings) -> SorsaExperts:
    torch.manual_seed(0)
    layer = SorsaExperts(EXPERTS, IN, OUT, rank, storage=storage or Dense(dtype), factor_dtype=dtype, **settings)
    matrices = torch.randn(EXPERTS, OUT, IN)
    with torch.no_grad():
        for factor in (layer.U, layer.s, layer.V):
            factor.copy_(torch.randn_like(factor))
        for name, kept in zip(layer.storage.names, pack_stack(layer.storage, matrices), strict=True):
            setattr(layer, name, nn.Parameter(kept, requires_grad=False))
    return layer


def independent(layer: SorsaExperts, x: Tensor, routes: Routes) -> Tensor:
    """Each row by the sum of its own expert's matrices."""
    kept = [getattr(layer, name) for name in layer.storage.names]
    rows = []
    for row, e in zip(x, routes.expert.tolist(), strict=True):
        rest = layer.storage.dense([tensor[e] for tensor in kept], (OUT, IN), x.dtype)
        rows.append((rest + layer.scale * layer.U[e] @ layer.s[e].diag() @ layer.V[e].T) @ row)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["loop", "batched"])  # grouped products take no float64
def test_gradients_are_those_of_finite_differences(form: Form):
    layer = experts(torch.float64, scale=0.7)
    routes, _ = Routes.of(CHOSEN, EXPERTS, form)
    x = torch.randn(CHOSEN.numel(), IN, dtype=torch.float64, requires_grad=True)

    def forward(x, U, s, V):
        return torch.func.functional_call(layer, {"U": U, "s": s, "V": V}, (x, routes))

    assert torch.autograd.gradcheck(forward, (x, layer.U, layer.s, layer.V), fast_mode=True)


@pytest.mark.parametrize("form", ["loop", "grouped", "batched"])
@pytest.mark.parametrize("storage", [None, Nf4(64), Int8(64), Nf4Double(64)], ids=["dense", "nf4", "int8", "double"])
def test_each_form_computes_with_each_experts_own_matrices(form: Form, storage, monkeypatch):
    monkeypatch.setattr(expert_layer, "DENSE_BYTES", 2 * 4 * IN * OUT)  # packed experts are made dense two at a time
    layer = experts(torch.float32, storage, scale=0.7)
    routes, _ = Routes.of(CHOSEN, EXPERTS, form)
    x = torch.randn(CHOSEN.numel(), IN, requires_grad=True)
    weights = torch.randn(CHOSEN.numel(), OUT)
    found, wanted = layer(x, routes), independent(layer, x, routes)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    inputs = (x, layer.U, layer.s, layer.V)
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=2e-5)
    assert not ours[1][3].any() and not ours[2][3].any() and not ours[3][3].any()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_rank_whose_rows_the_grouped_product_cannot_take(rank: int):
    layer = experts(torch.float32, rank=rank)
    routes, _ = Routes.of(CHOSEN, EXPERTS, "grouped")
    x = torch.randn(CHOSEN.numel(), IN, requires_grad=True)
    inputs = (x, layer.U, layer.s, layer.V)
    found, wanted = layer(x, routes), independent(layer, x, routes)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for our, their in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


def test_rows_of_the_same_expert_keep_their_order():
    routes, order = Routes.of(CHOSEN, EXPERTS, "loop")
    assert routes.expert.tolist() == sorted(CHOSEN.flatten().tolist())
    assert routes.ends.tolist() == [5, 8, 10, 10, 14]
    assert order[:5].tolist() == [1, 2, 6, 8, 11]
    assert routes.spans == [(0, 5), (5, 8), (8, 10), (10, 10), (10, 14)]


@pytest.mark.parametrize("form", ["loop", "grouped", "batched"])
def test_no_token_at_all(form: Form):
    layer = experts(torch.float32)
    routes, _ = Routes.of(CHOSEN[:0], EXPERTS, form)
    x = torch.randn(0, IN, requires_grad=True)
    y = layer(x, routes)
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert layer.U.grad is not None and not layer.U.grad.any()


def test_autocast_multiplies_in_bf16():
    layer = experts(torch.float32)
    routes, _ = Routes.of(CHOSEN, EXPERTS, "grouped")
    x = torch.randn(CHOSEN.numel(), IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, routes)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), independent(layer, x, routes), rtol=0.05, atol=0.5)


def test_dropout_is_on_the_principal_branch_alone():
    layer = experts(torch.float32, dropout=0.5)
    routes, _ = Routes.of(CHOSEN, EXPERTS, "loop")
    x = torch.randn(CHOSEN.numel(), IN)
    torch.manual_seed(1)
    found = layer(x, routes)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    with torch.no_grad():
        whole = independent(layer, dropped, routes)
        layer.s.zero_()
        rest = independent(layer, x, routes) - independent(layer, dropped, routes)
    torch.testing.assert_close(found, whole + rest, rtol=1e-5, atol=1e-5)


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(ValueError, match=r"rank 17 is not in 1 \.\. 16"):
        SorsaExperts(2, IN, OUT, 17, device="meta")


@pytest.mark.parametrize("storage", [Dense(torch.float32), Nf4(64), Int8(64), Nf4Double(64)], ids=str)
@pytest.mark.parametrize("shape", [(16, 24), (5, 7)], ids=["whole blocks", "cut blocks"])
def test_packed_experts_are_those_of_each_matrix_alone(storage: Storage, shape):
    matrices = torch.randn(3, *shape)
    found = dense_stack(storage, pack_stack(storage, matrices), shape, torch.float32)
    for one, matrix in zip(found, matrices, strict=True):
        assert torch.equal(one, storage.dense(storage.pack(matrix), shape, torch.float32))


def test_no_product_of_factors_is_ever_formed():
    """Forward: rows through W_r, V and U. Backward: the same three again, and the gradients of U and V."""
    layer, rows = experts(torch.float32), CHOSEN.numel()
    routes, _ = Routes.of(CHOSEN, EXPERTS, "loop")
    x = torch.randn(rows, IN, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x, routes)
    assert forward.get_total_flops() == 2 * rows * (IN * OUT + RANK * (IN + OUT))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * rows * (IN * OUT + 2 * RANK * (IN + OUT))


def test_what_is_kept_for_the_backward_pass_is_the_rows_and_their_coordinates():
    layer, rows = experts(torch.float32), CHOSEN.numel()
    routes, _ = Routes.of(CHOSEN, EXPERTS, "grouped")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(rows, IN, requires_grad=True), routes)
    parameters = {id(parameter) for parameter in layer.parameters()}
    assert sum(tensor.numel() for tensor in kept if id(tensor) not in parameters) == rows * (IN + RANK)
