"""The change of a weight since training began: against dense matrices in float64, and against the trainer's layer."""

import pytest
import torch

from sorsa_ds.sorsa.change import apply_change, dense_change
from sorsa_ds.sorsa.decompose import Factors
from sorsa_ds.sorsa.layer import SorsaLinear

M, N, R = 14, 9, 3


def pair(dtype=torch.float32, seed=0, trained=True) -> tuple[Factors, Factors]:
    """Factors now, which need a gradient, and factors with which training began."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (M, R), (R,), (N, R)
    begun = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    now = [one + 0.3 * torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in begun]
    return Factors(*(one.to(dtype).requires_grad_(trained) for one in now)), Factors(*(one.to(dtype) for one in begun))


def dense(now: Factors, begun: Factors, scale: float) -> torch.Tensor:
    """The change by its definition, in float64."""
    U, s, V, U_0, s_0, V_0 = (one.double() for one in (*now.tensors(), *begun.tensors()))
    return scale * (U @ torch.diag(s) @ V.T - U_0 @ torch.diag(s_0) @ V_0.T)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_outputs_and_gradients_are_those_of_the_dense_change(scale):
    now, begun = pair()
    x = torch.randn(2, 5, N, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(2, 5, M, generator=torch.Generator().manual_seed(2))
    y = apply_change(x, now, begun, scale)
    gradients = torch.autograd.grad(y, [x, *now.tensors()], upstream)

    wide = [one.detach().double().requires_grad_() for one in (x, *now.tensors())]
    expected = wide[0] @ dense(Factors(*wide[1:]), begun, scale).T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense_change(now, begun, scale).double(), dense(now, begun, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_with_the_base_weight_it_is_the_trainers_layer(dropout):
    """The same outputs and gradients as of SorsaLinear, whose residual is W_0 - scale * U_0 diag(s_0) V_0^T."""
    (now, begun), scale = pair(), 0.5
    W_0 = torch.randn(M, N, generator=torch.Generator().manual_seed(3))
    layer = SorsaLinear(N, M, R, scale=scale, dropout=dropout)
    with torch.no_grad():
        layer.residual.copy_(W_0 - (begun.U * begun.s) @ begun.V.T * scale)
        for leaf in ("U", "s", "V"):
            getattr(layer, leaf).copy_(getattr(now, leaf))
    x = torch.randn(7, N, generator=torch.Generator().manual_seed(4)).requires_grad_()
    upstream = torch.randn(7, M, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(6)
    ours = x @ W_0.T + apply_change(x, now, begun, scale, dropout)
    torch.manual_seed(6)
    theirs = layer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(ours, [x, *now.tensors()], upstream),
        torch.autograd.grad(theirs, [x, layer.U, layer.s, layer.V], upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_at_the_start_it_is_nothing_in_bf16_too():
    """Each product alone, rounded to bf16, would be off by 2^-9 of itself; their sum in one product is not."""
    _, begun = pair()
    x = torch.randn(50, N, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = apply_change(x, Factors(*(one.clone() for one in begun.tensors())), begun)
    assert y.dtype == torch.bfloat16
    assert (y.float().norm() / (x @ ((begun.U * begun.s) @ begun.V.T).T).norm()).item() < 1e-5


def test_initial_factors_are_rounded_as_the_trained_ones_are():
    """A program may round what is trained, and that alone, to bf16, as TRL does over a 4-bit base."""
    _, begun = pair()
    rounded = Factors(*(one.bfloat16() for one in begun.tensors()))
    x = torch.randn(50, N, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert apply_change(x, rounded, begun).abs().max().item() < 1e-5
    assert dense_change(rounded, begun).abs().max().item() < 1e-5


def test_what_is_frozen_gets_no_gradient_and_costs_none():
    now, begun = pair()
    x = torch.randn(7, N)
    y = apply_change(x, now, begun)
    y.sum().backward()
    assert x.grad is None
    assert all(one.grad is None for one in begun.tensors())
    assert all(one.grad is not None for one in now.tensors())
