"""One layer: its values and gradients against definition and finite differences, and what it keeps for backward."""

import pytest
import torch

from benchmarks.helpers.flops import flop_counter
from sorsa_ds.sorsa.decompose import decompose, residual
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Dense
from sorsa_ds.sorsa.sides import keep_sides, kept_bytes

T, M, N, R = 12, 9, 7, 4


def make_layer(bias=True, scale=1.0, dropout=0.0, dtype=torch.float64):
    """A layer with random parameters."""
    torch.manual_seed(0)
    layer = SorsaLinear(
        N, M, R, bias=bias, scale=scale, dropout=dropout, storage=Dense(dtype), factor_dtype=dtype, bias_dtype=dtype
    )  # fmt: skip
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def dense(layer, x):
    """The layer by definition (eq. 8), with the product formed."""
    weight = layer.residual + layer.scale * layer.U @ torch.diag(layer.s) @ layer.V.T
    return torch.nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_forward_and_gradients_equal_the_definition(bias, scale):
    layer = make_layer(bias, scale)
    x = torch.randn(2, 6, N, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 6, M, dtype=torch.float64)
    wanted = [x, layer.U, layer.s, layer.V]
    ours = torch.autograd.grad((layer(x) * weights).sum(), wanted)
    theirs = torch.autograd.grad((dense(layer, x) * weights).sum(), wanted)
    torch.testing.assert_close(layer(x), dense(layer, x))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    layer = make_layer(scale=0.7)
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)

    def function(x, U, s, V):
        return torch.func.functional_call(layer, {"U": U, "s": s, "V": V}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.U, layer.s, layer.V))


def test_gradcheck_with_dropout():
    layer = make_layer(dropout=0.5).train()
    x = torch.randn(5, N, dtype=torch.float64, requires_grad=True)

    def function(x, U, s, V):
        torch.manual_seed(3)  # the same mask each time
        return torch.func.functional_call(layer, {"U": U, "s": s, "V": V}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.U, layer.s, layer.V))


def test_dropout_acts_on_the_principal_branch_in_training_only():
    layer = make_layer(bias=False, dropout=0.5)
    x = torch.randn(T, N, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), dense(layer, x))
    torch.manual_seed(1)
    dropped = layer.train()(x)
    torch.manual_seed(1)
    masked = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(dropped, x @ layer.residual.T + (masked @ layer.V * layer.s) @ layer.U.T)


@pytest.mark.parametrize(("autocast", "itemsize"), [(False, 4), (True, 2)])
def test_kept_for_backward_are_the_bytes_of_the_input_and_a_rank_wide_product_only(autocast, itemsize):
    layer = make_layer(bias=False, dtype=torch.float32)
    if autocast:
        layer.residual.data = layer.residual.data.bfloat16()
    kept = []
    x = torch.randn(T, N, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = layer(x)
    parameters = {p.data_ptr(): p.nbytes for p in layer.parameters()}
    activations = [t for t in kept if t.data_ptr() not in parameters]
    assert sorted(t.nbytes for t in activations) == sorted([T * N * itemsize, T * R * itemsize])
    saved = {t.data_ptr(): t.nbytes for t in kept if t.data_ptr() in parameters}
    assert saved == parameters, "the parameters themselves, and no cast of them: ZeRO-3 frees and gathers them"
    assert not [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)], "kept past the hooks"


def test_flops_are_those_of_the_thin_products():
    layer = make_layer(bias=False, dtype=torch.float32)
    x = torch.randn(T, N, requires_grad=True)
    with flop_counter() as forward:
        y = layer(x)
    assert forward.get_total_flops() == 2 * T * (M * N + R * (M + N))
    with flop_counter() as backward:
        y.sum().backward()
    # grad x through W_r and through V, grad z, grad U, grad V; none for the frozen W_r
    assert backward.get_total_flops() == 2 * T * (M * N + R * N + R * M + R * M + R * N)
    assert layer.residual.grad is None


def test_first_layer_computes_no_input_gradient():
    layer = make_layer(bias=False, dtype=torch.float32)
    y = layer(torch.randn(T, N))
    with flop_counter() as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * T * (R * M + R * M + R * N)


def test_autocast_multiplies_in_bf16_and_keeps_fp32_gradients():
    layer = make_layer(bias=False, dtype=torch.float32)
    layer.residual.data = layer.residual.data.bfloat16()
    x = torch.randn(T, N, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.U.grad.dtype == layer.s.grad.dtype == x.grad.dtype == torch.float32
    exact = dense(layer, x.detach()).detach()
    assert (y.float() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_kept_sides_give_the_gradients_of_sides_that_are_made_in_each_pass(autocast, scale):
    layer = make_layer(scale=scale, dtype=torch.float32)
    if autocast:
        layer.residual.data = layer.residual.data.bfloat16()
    x = torch.randn(T, N, requires_grad=True)

    def micro_batches():
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for part in (x[:5], x[5:]):
                layer(part).float().square().sum().backward()
        return [layer.U.grad.clone(), layer.s.grad.clone(), layer.V.grad.clone()]

    wanted = micro_batches()
    dtype = torch.bfloat16 if autocast else torch.float32
    with keep_sides([layer], dtype):
        kept = micro_batches()
        tensors = [one for one in layer.kept_sides.tensors if one is not None]
    assert all(map(torch.equal, kept, wanted))
    assert layer.kept_sides is None
    assert sum(one.nbytes for one in tensors) == kept_bytes(1, M, N, R, dtype, torch.float32)


def test_where_a_layer_computes_in_another_dtype_than_its_kept_sides_have_it_makes_its_own():
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(T, N)
    wanted = layer(x)
    with keep_sides([layer], torch.bfloat16):
        assert torch.equal(layer(x), wanted)


def test_sides_are_made_anew_when_the_factors_have_moved():
    layer = make_layer()
    x = torch.randn(T, N, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad(), keep_sides([layer]):
            torch.testing.assert_close(layer(x), dense(layer, x))
            layer.s.mul_(2)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (1, 6), (6, 1), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decomposition(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    rank = min(shape) if min(shape) < 3 else 3
    factors = decompose(weight, rank)
    wide = weight.double()
    expected = torch.linalg.svdvals(wide)[:rank]
    torch.testing.assert_close(factors.s.double(), expected, rtol=1e-5, atol=1e-6)
    for X in (factors.U, factors.V):
        assert X.is_contiguous()
        gram = X.double().T @ X.double()
        torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=2e-6)
    rest = residual(weight, factors)
    # The residual is orthogonal to the principal part, and adding that gives the weight back.
    assert (rest.double() @ factors.V.double()).norm() < 1e-5 * wide.norm()
    back = rest + (factors.U * factors.s) @ factors.V.T
    torch.testing.assert_close(back.double(), wide, rtol=0, atol=1e-5)


def test_signs_are_fixed():
    torch.manual_seed(0)
    weight = torch.randn(20, 30)
    factors = decompose(weight, 5)
    largest = factors.U.gather(0, factors.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_zero_and_rank_deficient_matrices():
    zero = decompose(torch.zeros(6, 5), 2)
    assert zero.s.eq(0).all()
    assert residual(torch.zeros(6, 5), zero).abs().max() == 0
    thin = decompose(torch.ones(6, 5), 3)
    torch.testing.assert_close(thin.U.T @ thin.U, torch.eye(3), rtol=0, atol=1e-5)


def test_residual_is_taken_against_the_rounded_factors():
    torch.manual_seed(0)
    weight = torch.randn(64, 48) @ torch.diag(torch.logspace(1, -2, 48))
    factors = decompose(weight, 8)
    rest = residual(weight, factors, used_dtype=torch.bfloat16)
    used = (factors.U * factors.s).bfloat16().float() @ factors.V.bfloat16().float().T
    assert ((rest + used) - weight).norm() / weight.norm() < 1e-6
    careless = residual(weight, factors)
    assert ((careless + used) - weight).norm() / weight.norm() > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_refused_by_name(bad):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="model.q_proj: .*NaN or Inf"):
        decompose(weight, 2, "model.q_proj")


@pytest.mark.parametrize("rank", [0, 8])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match="rank"):
        SorsaLinear(7, 9, rank)
    with pytest.raises(ValueError, match="layer: rank"):
        decompose(torch.ones(9, 7), rank, "layer")
