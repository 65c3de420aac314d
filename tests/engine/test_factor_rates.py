"""Rates of their own for columns of U and V and for s, against plain torch with a parameter group for each column."""

import pytest
import torch
from torch import nn

from examples import sorsa_in_one_page as page
from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.engine.factor_rates import LEAST_SHARE, FactorRates
from sorsa_ds.engine.masters import Fragment, Masters
from tests.helpers.engines import RATE, STEPS, WARMUP, build, ds_config, sequences, ten_steps
from tests.helpers.reference import plain_model
from tests.helpers.worlds import run_ranks

CASE = dict(form="norm", reduction="mean", clip=0.0, accumulation=1, coefficient=0.2)
CASES = [
    (SorsaConfig(column_rates="inverse_sqrt"), {**CASE, "clip": 0.05}),
    (SorsaConfig(column_rates="inverse", s_lr_ratio=3.0), CASE),
    (SorsaConfig(s_space="log", s_lr_ratio=0.5), CASE),
]
STAGES = [(0, ""), (1, ""), (2, "optimizer"), (3, ""), (3, "both")]


class ByColumn(nn.Module):
    """A SORSA layer whose columns are parameters of their own, and which may have the logarithms of s."""

    def __init__(self, layer: page.DenseSorsa, settings: SorsaConfig):
        super().__init__()
        self.register_buffer("W_r", layer.W_r)
        self.register_buffer("bias", getattr(layer, "bias", None))
        self.log, power = settings.s_space == "log", {"equal": 0, "inverse_sqrt": 0.5, "inverse": 1}
        s = layer.s.detach()
        self.rates = [float(x) ** -power[settings.column_rates] for x in s] + [settings.s_lr_ratio]
        self.u = nn.ParameterList([*layer.U.detach().T.clone()])
        self.v = nn.ParameterList([*layer.V.detach().T.clone()])
        self.own_s = nn.Parameter(s.log() if self.log else s.clone())

    U = property(lambda self: torch.stack([*self.u], dim=1))
    V = property(lambda self: torch.stack([*self.v], dim=1))
    s = property(lambda self: self.own_s.exp() if self.log else self.own_s)

    def groups(self) -> list[tuple[list, float]]:
        """Parameters with one rate, and that rate."""
        *columns, of_s = self.rates
        pairs = [([u, v], rate) for u, v, rate in zip(self.u, self.v, columns, strict=True)]
        return [*pairs, ([self.own_s], of_s)]

    def forward(self, x):
        y = x @ (self.W_r + self.U @ torch.diag(self.s) @ self.V.T).T
        return y if self.bias is None else y + self.bias


def trained_by_column(folder, world, settings, case, start):
    """The factors after ten steps in which each column is a parameter with a group of its own."""
    names = {name.rpartition(".")[0] for name in start}
    model = plain_model(folder, {name: tuple(start[f"{name}.{leaf}"] for leaf in "UsV") for name in names})
    layers = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layers[name] = ByColumn(model.get_submodule(name), settings)
        setattr(model.get_submodule(parent), leaf, layers[name])
    groups = [(own, rate) for layer in layers.values() for own, rate in layer.groups()]
    optimizer = torch.optim.AdamW([{"params": own} for own, _ in groups], lr=RATE, weight_decay=0.0)
    trained = [p for own, _ in groups for p in own]
    for t in range(STEPS):
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * page.learning_rate(t, RATE, WARMUP, STEPS)
        optimizer.zero_grad()
        loss, count = 0.0, 0
        for ids, labels in sequences(2 * world, seed=t):
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = loss + nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
            count += int((labels[:, 1:] != -100).sum())
        (loss / count).backward()
        if case["clip"]:
            nn.utils.clip_grad_norm_(trained, case["clip"])
        terms = []
        for layer in layers.values():
            for X in (layer.U, layer.V):
                error = X.T @ X - torch.eye(X.shape[1], dtype=X.dtype)
                norm = error.square().sum().sqrt()
                terms.append(norm if norm > page.ROUNDING * X.shape[1] ** 0.5 else norm.detach())
        if (mean := torch.stack(terms).mean()).requires_grad:
            (case["coefficient"] * mean).backward()
        optimizer.step()
    return {f"{name}.{leaf}": getattr(layer, leaf).detach() for name, layer in layers.items() for leaf in "UsV"}


def runs_of(world):
    """Every case on every stage; on three ranks, which take long, every stage and every case once or twice."""
    if world == 3:
        return [(*CASES[number % len(CASES)], *where) for number, where in enumerate(STAGES)]
    return [(*case, *where) for case in CASES for where in STAGES]


def train_all(folder):
    """All runs of this world, on rank 0: factors before and after."""
    from sorsa_ds.runtime import collectives

    results = []
    for settings, case, stage, offload in runs_of(collectives.world_size()):
        engine = build(folder, ds_config(stage, offload, case["clip"], 1), case, rates=settings)
        start, end, _ = ten_steps(engine, case)
        results.append((start, end))
    return results if collectives.rank() == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ten_steps_equal_a_parameter_group_for_each_column(tiny_llama, world):
    results, expected = run_ranks(world, train_all, tiny_llama)[0], {}
    for (settings, case, stage, offload), (start, end) in zip(runs_of(world), results, strict=True):
        if settings not in expected:
            expected[settings] = trained_by_column(tiny_llama, world, settings, case, start)
        for name, value in end.items():
            moved = (expected[settings][name] - start[name]).norm()
            gap = (value - expected[settings][name]).norm()
            assert moved > 1e-4 and gap < 2e-4 * moved, (
                f"{settings}, stage {stage} {offload}, {name}: {gap / moved:.1e}"
            )


def _factor_rates(settings, shapes, fragments):
    masters = Masters([Fragment(*fragment, offset=0) for fragment in fragments], sharded=False)
    return FactorRates(settings, masters, shapes, torch.device("cpu"))


def test_each_expert_has_rates_of_its_own_also_where_a_fragment_begins_within_one():
    shapes = {"e.U": torch.Size((2, 3, 2)), "e.s": torch.Size((2, 2)), "e.V": torch.Size((2, 3, 2))}
    s = torch.tensor([4.0, 2.0, 8.0, 1.0])
    U = torch.zeros(7)  # from position 3 on: the second number of row 1 of the first expert
    rates = _factor_rates(SorsaConfig(column_rates="inverse"), shapes, [
        ("e.s", shapes["e.s"], 0, 4, s), ("e.U", shapes["e.U"], 3, 7, U),
    ])  # fmt: skip
    rates.begin([s, U])
    U += 1
    rates.end()
    assert U.tolist() == [1 / 2, 1 / 4, 1 / 2, 1 / 8, 1, 1 / 8, 1]


def test_vanishing_singular_values_have_a_bounded_rate():
    shapes = {"a.U": torch.Size((1, 2)), "a.s": torch.Size((2,)), "b.U": torch.Size((1, 1)), "b.s": torch.Size((1,))}
    a, b = torch.ones(2), torch.ones(1)
    values = [("a.s", shapes["a.s"], 0, 2, torch.tensor([2.0, 0.0])), ("b.s", shapes["b.s"], 0, 1, torch.zeros(1))]
    rates = _factor_rates(SorsaConfig(column_rates="inverse"), shapes, [
        *values, ("a.U", shapes["a.U"], 0, 2, a), ("b.U", shapes["b.U"], 0, 1, b),
    ])  # fmt: skip
    rates.begin([a, b])
    a += 1
    b += 1
    rates.end()
    torch.testing.assert_close(a, torch.tensor([1.5, 1 + 1 / (2 * LEAST_SHARE)]))
    assert b.tolist() == [2.0], "a matrix of zeros has no scale"


def test_what_a_run_began_with_decides_and_not_what_it_goes_on_from():
    shapes = {"a.U": torch.Size((1, 1)), "a.s": torch.Size((1,)), "a.V": torch.Size((1, 1))}
    U = torch.zeros(1)
    rates = _factor_rates(SorsaConfig(column_rates="inverse"), shapes, [
        ("a.s", shapes["a.s"], 0, 1, torch.tensor([5.0])), ("a.U", shapes["a.U"], 0, 1, U),
    ])  # fmt: skip
    assert rates.initial_s.tolist() == [5.0]
    rates.initial_s = torch.tensor([2.0])
    rates.begin([U])
    U += 1
    rates.end()
    assert U.tolist() == [0.5]
