"""The regulariser's closed form against autograd of its definition, its presets, and its fragments."""

import pytest
import torch

from sorsa_ds.config.schema import RegularizerConfig
from sorsa_ds.engine import grams
from sorsa_ds.engine.grams import ShardedGrams
from sorsa_ds.engine.masters import Fragment, Masters
from sorsa_ds.engine.regularize import ShardedRegularizer
from sorsa_ds.sorsa.decompose import decompose
from sorsa_ds.sorsa.regularizer import (
    Regularizer,
    gradient_factor,
    penalty,
    resolve_regularizer,
    rounding_level,
)
from tests.helpers.worlds import run_ranks

SHAPES = {
    "a.U": torch.Size((7, 3)), "a.s": torch.Size((3,)), "a.V": torch.Size((11, 3)),
    "b.U": torch.Size((2, 2)), "b.s": torch.Size((2,)), "b.V": torch.Size((5, 2)),
    "c.U": torch.Size((4, 1)), "c.s": torch.Size((1,)), "c.V": torch.Size((1, 1)),
}  # fmt: skip


def tensors():
    """One tensor of each shape, columns of unequal length."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def definition(values, form, reduction):
    """L_reg and its gradients by autograd in float64."""
    leaves = {n: x.double().requires_grad_() for n, x in values.items() if n[-1] in "UV"}
    terms = []
    for x in leaves.values():
        square = (x.T @ x - torch.eye(x.shape[1], dtype=torch.float64)).square().sum()
        terms.append(square if form == "squared" else square.sqrt())
    total = torch.stack(terms).mean() if reduction == "mean" else torch.stack(terms).sum()
    return total.item(), dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_closed_form_gradient(form):
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    error = x.T @ x - torch.eye(3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(penalty(error, form), x)
    torch.testing.assert_close(x.detach() @ gradient_factor(error.detach(), form), expected)


def off_by(share, rank, form):
    """E = X^T X - I of a Frobenius norm that is this share of the rounding level, and F from it."""
    error = torch.randn(2, rank, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    error *= share * rounding_level(rank) / torch.linalg.matrix_norm(error)[:, None, None]
    return error, gradient_factor(error, form)


@pytest.mark.parametrize("rank", [1, 3, 128])
@pytest.mark.parametrize("form", ["norm", "squared"])
def test_the_gradient_is_zero_up_to_rounding_and_the_definition_s_above(form, rank):
    for share in (0.0, 1e-6, 0.99):
        assert off_by(share, rank, form)[1].eq(0).all()
    error, factor = off_by(1.01, rank, form)
    assert torch.equal(factor, 4 * error if form == "squared" else 2 * error / error.norm(dim=(1, 2), keepdim=True))
    error, factor = off_by(1.01, rank, form)
    error[0] *= 0.5
    assert gradient_factor(error, form)[0].eq(0).all()  # each matrix counts by itself
    assert torch.equal(gradient_factor(error, form)[1], factor[1])
    assert penalty(error, "norm") == pytest.approx([rounding_level(rank) * share for share in (0.505, 1.01)])


@pytest.mark.parametrize("rows", [4, 40, 4096])
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_of_an_initialisation_and_of_exact_columns_count_as_orthonormal(rows, rank):
    """What one step of AdamW at a learning rate of 1e-6 makes of them does not."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 64, generator=generator)
    exact, _ = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))
    made = decompose(weight, rank)
    for x in (made.U, made.V, exact.float()):
        moved = x + 1e-6 * x.sign()
        for columns, zero in ((x, True), (moved, False)):
            error = columns.double().T @ columns.double() - torch.eye(rank, dtype=torch.float64)
            assert gradient_factor(error, "norm").eq(0).all() == zero


def _cut_evenly(form, reduction):
    """Each rank holds one flat block of every tensor, as ZeRO-3 cuts it, inside one master with gaps around."""
    from sorsa_ds.runtime import collectives

    world, rank = collectives.world_size(), collectives.rank()
    fragments, pieces, offset = [], [], 5
    for name, value in tensors().items():
        block = -(-value.numel() // world)
        start = min(block * rank, value.numel())
        numel = min(block, value.numel() - start)
        fragments.append((name, value.shape, start, numel, offset))
        pieces.append(value.view(-1)[start : start + numel])
        offset += numel
    master = torch.cat([torch.full((5,), 9.0), *pieces, torch.full((3,), 9.0)])
    master.grad = torch.zeros_like(master)
    masters = Masters([Fragment(n, s, a, k, master, o) for n, s, a, k, o in fragments if k], sharded=True)
    whole = ShardedGrams(masters, SHAPES, torch.device("cpu"))
    sharded = ShardedRegularizer(Regularizer(form, reduction, 0.3), whole)
    value, added = sharded.prepare()
    sharded.add_to([master])
    assert master.grad[:5].eq(0).all() and master.grad[-3:].eq(0).all()
    got = {f.name: (f.start, f.gradient().clone()) for f in masters.fragments}
    return value.item(), added.item(), got


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("form", "reduction"), [("norm", "mean"), ("squared", "sum")])
def test_fragments_of_any_world_size_make_the_gradient_of_the_whole(world, form, reduction):
    value, gradients = definition(tensors(), form, reduction)
    norm = 0.3 * torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    whole = {name: torch.full((shape.numel(),), torch.nan) for name, shape in SHAPES.items()}
    for rank_value, rank_norm, parts in run_ranks(world, _cut_evenly, form, reduction):
        assert rank_value == pytest.approx(value, rel=1e-12)
        assert rank_norm == pytest.approx(norm, rel=1e-9)
        for name, (start, gradient) in parts.items():
            whole[name][start : start + len(gradient)] = gradient
    for name, shape in SHAPES.items():
        expected = 0.3 * gradients[name].float() if name in gradients else torch.zeros(shape)
        torch.testing.assert_close(whole[name].view(shape), expected, rtol=1e-5, atol=1e-6)


def test_default_preset_is_independent_of_accumulation():
    for steps in (1, 64):
        resolved = resolve_regularizer(RegularizerConfig(), learning_rate=3e-5, accumulation_steps=steps)
        assert resolved == Regularizer("norm", "mean", 0.2)


def test_published_setups():
    """Llama 2 7B (lr 3e-5, accumulation 64): the two readings of one gamma differ by 448 x 64 (method, section 2)."""
    reference, paper = (
        resolve_regularizer(RegularizerConfig(preset=preset), learning_rate=3e-5, accumulation_steps=64)
        for preset in ("reference", "paper")
    )
    assert reference == Regularizer("norm", "mean", pytest.approx(4e-4 / 3e-5 / 64))
    assert paper == Regularizer("norm", "sum", pytest.approx(4e-4 / 3e-5))
    error = torch.rand(448, 2, 2)
    mean = reference.coefficient * gradient_factor(error, "norm") / 448
    summed = paper.coefficient * gradient_factor(error, "norm")
    torch.testing.assert_close(summed / mean, torch.full_like(mean, 448 * 64))


@pytest.mark.parametrize("accumulation", [1, 8, 64])
def test_a_number_divides_whatever_the_run_accumulates(accumulation):
    """The published strength, gamma 4e-4 over 64 accumulations, to the last bit; and no division, and the run's own."""

    def coefficient(divide):
        config = RegularizerConfig(preset="reference", divide_by_accumulation=divide)
        return resolve_regularizer(config, learning_rate=3e-5, accumulation_steps=accumulation).coefficient

    assert coefficient(64) == 4e-4 / 3e-5 / 64
    assert coefficient(1) == coefficient(False) == 4e-4 / 3e-5
    assert coefficient(True) == coefficient(None) == 4e-4 / 3e-5 / accumulation


def test_own_fields_win_over_the_preset():
    config = RegularizerConfig(preset="paper", form="squared", gamma="0.5 * lr", reduction="mean")
    assert resolve_regularizer(config, learning_rate=1e-3, accumulation_steps=8) == Regularizer("squared", "mean", 0.5)
    config = RegularizerConfig(gamma=0.0)
    assert resolve_regularizer(config, learning_rate=1e-3, accumulation_steps=8).coefficient == 0


@pytest.mark.parametrize("gamma", ["0.2", "lr", "0.2*rate", "-1*lr", "nan*lr", "inf*lr"])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match=r"regularizer.gamma: .* `0.2\*lr`"):
        RegularizerConfig(gamma=gamma)


def test_how_many_factors_are_multiplied_at_once_changes_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{layer}.{factor}": torch.Size((rows, 3)) for layer in "abcd" for factor, rows in (("U", 7), ("V", 11))}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found = []
    for together in (1, 50, 2**21):
        monkeypatch.setattr(grams, "TOGETHER", together)
        masters = {name: value.clone() for name, value in values.items()}
        for master in masters.values():
            master.grad = torch.ones_like(master)
        fragments = [Fragment(name, one.shape, 0, one.numel(), one, 0) for name, one in masters.items()]
        whole = ShardedGrams(Masters(fragments, sharded=False), shapes, torch.device("cpu"))
        regularizer = ShardedRegularizer(Regularizer("norm", "mean", 0.3), whole)
        value, norm = regularizer.prepare()
        regularizer.add_to(list(masters.values()))
        found.append((len(whole.alike), value, norm, torch.cat([one.grad.flatten() for one in masters.values()])))
    assert [groups for groups, *_ in found] == [8, 6, 2]
    for _, *numbers in found[1:]:
        for one, wanted in zip(numbers, found[0][1:], strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-9)
