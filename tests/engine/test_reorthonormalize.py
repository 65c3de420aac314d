"""U and V made orthonormal every N steps: the layer stays, on every ZeRO stage, and training is plain torch's."""

import pytest
import torch

from sorsa_ds.config.schema import RegularizerConfig, RunConfig
from sorsa_ds.methods.settings import check_settings
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa import rotations as rotations_module
from sorsa_ds.sorsa.regularizer import resolve_regularizer
from sorsa_ds.sorsa.rotations import rotations
from tests.helpers.engines import (
    MICRO,
    RATE,
    STEPS,
    WARMUP,
    build,
    ds_config,
    micro_losses,
    sequences,
    whole_factors,
)
from tests.helpers.projects import metrics
from tests.helpers.reference import plain_model, train
from tests.helpers.runs import rewound, trained
from tests.helpers.runs import train as train_run
from tests.helpers.worlds import run_ranks

EVERY, TAKEN = 2, 5
CASE = dict(form="squared", reduction="mean", clip=0.05, accumulation=1, coefficient=0.2, reorthonormalize=EVERY)
# Shapes (40, 20, 76) x rank 5: two and three ranks cut rows. `small` cuts ZeRO-3's work into many sub-groups.
SETUPS = {
    1: [(0, ""), (3, "small")],
    2: [(0, ""), (2, "optimizer"), (3, ""), (3, "small both")],
    3: [(1, ""), (3, "small")],
}
PRODUCT_GAP, COLUMN_GAP = 3e-6, 1e-4
"""A product is as near plain torch's as without the option. Columns are less so: where two singular values are 0.1 %
apart (there are such), rounding turns the two by a thousand times itself, on one rank without ZeRO too."""


def factors(drift: float, s: list[float], seed: int = 0):
    """U (9, r), s and V (7, r) in float64, so far from orthonormal."""
    generator = torch.Generator().manual_seed(seed)

    def near(rows):
        q, _ = torch.linalg.qr(torch.randn(rows, len(s), generator=generator, dtype=torch.float64))
        return q + drift * torch.randn(rows, len(s), generator=generator, dtype=torch.float64)

    return near(9), torch.tensor(s, dtype=torch.float64), near(7)


def turned(u, s, v):
    [t_u], [new_s], [t_v] = rotations((u.T @ u)[None], s[None], (v.T @ v)[None])
    return u @ t_u, new_s, v @ t_v


@pytest.mark.parametrize("s", [[3.0, 2.0, 1.0, 0.5], [0.5, 3.0, -2.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
def test_the_product_stays_and_the_factors_are_orthonormal(s):
    u, s, v = factors(0.1, s)
    new_u, new_s, new_v = turned(u, s, v)
    torch.testing.assert_close((new_u * new_s) @ new_v.T, (u * s) @ v.T, rtol=0, atol=1e-12)
    for x in (new_u, new_v):
        torch.testing.assert_close(x.T @ x, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_columns_keep_their_place_and_sign():
    """Scales in any order and of any sign; two so near each other that the drift changes which is larger."""
    u, s, v = factors(1e-4, [0.5, 3.0, -2.0, 1.0])
    new_u, new_s, new_v = turned(u, s, v)
    for new, old in ((new_u, u), (new_s, s), (new_v, v)):
        torch.testing.assert_close(new, old, rtol=0, atol=5e-3)
    u, s, v = factors(0.0, [1.0, 0.999, 0.5])
    u = u * torch.tensor([0.998, 1.0, 1.0])
    new_u, new_s, _ = turned(u, s, v)
    torch.testing.assert_close(new_s, torch.tensor([0.998, 0.999, 0.5], dtype=torch.float64))
    torch.testing.assert_close(new_u, u / u.norm(dim=0))


def one_by_one(gram_u, s, gram_v):
    """What `rotations` returns for one layer, by LAPACK's SVD and a loop that takes the most similar columns first."""
    c_u, c_v = (torch.linalg.cholesky(gram, upper=True) for gram in (gram_u, gram_v))
    a, values, b_t = torch.linalg.svd((c_u * s) @ c_v.T)
    t_u, t_v = torch.linalg.solve(c_u, a), torch.linalg.solve(c_v, b_t.T)
    alike, order = t_u.square() + t_v.square(), [0] * len(s)
    for _ in order:
        old, new = divmod(int(alike.argmax()), len(s))
        order[old] = new
        alike[old] = alike[:, new] = -1
    t_u, values, t_v = t_u[:, order], values[order], t_v[:, order]
    sign_u, sign_v = t_u.diagonal().sign(), t_v.diagonal().sign()
    return t_u * sign_u, values * sign_u * sign_v, t_v * sign_v


def many(layers: int, rank: int):
    """Gram matrices and s of layers that have drifted between 1e-6 and 0.5, some with s from 1e-7 to 1 or below 0.

    Layer 0 has an s of zero.
    """
    generator = torch.Generator().manual_seed(rank)

    def gram(drift):
        x = torch.randn(layers, 3 * rank + 5, rank, generator=generator, dtype=torch.float64)
        x = torch.linalg.qr(x).Q + drift * torch.randn(x.shape, generator=generator, dtype=torch.float64) / rank
        return x.mT @ x

    drift = torch.logspace(-6, -0.3, layers, dtype=torch.float64)[:, None, None]
    s = 0.1 + torch.rand(layers, rank, generator=generator, dtype=torch.float64)
    s[1::3] = torch.logspace(0, -7, rank, dtype=torch.float64)
    s[2::3, ::2] *= -1
    s[0, -1] = 0
    return gram(drift), s, gram(drift)


@pytest.mark.parametrize("rank", [1, 8, 33])
def test_a_batch_is_what_its_layers_are_one_by_one(monkeypatch, rank):
    monkeypatch.setattr(rotations_module, "CHUNK_NUMBERS", 5 * rank**2)  # a last chunk of two layers
    grams_u, s, grams_v = many(12, rank)
    found = rotations(grams_u, s, grams_v)
    for layer, (t_u, new_s, t_v) in enumerate(zip(*found, strict=True)):
        for gram, turn in ((grams_u[layer], t_u), (grams_v[layer], t_v)):
            torch.testing.assert_close(turn.T @ gram @ turn, torch.eye(rank).double(), rtol=0, atol=1e-12)
        # U T_U diag(s') T_V^T V^T = U diag(s) V^T for any U and V of full rank.
        torch.testing.assert_close((t_u * new_s) @ t_v.T, torch.diag(s[layer]), rtol=0, atol=1e-11)
        for got, expected in zip((t_u, new_s, t_v), one_by_one(grams_u[layer], s[layer], grams_v[layer]), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_only_an_s_of_zero_needs_an_svd(monkeypatch):
    """An SVD is slow on a GPU."""
    taken, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x: taken.append(len(x)) or svd(x))
    rotations(*many(12, 8))
    assert taken == [1]


def test_what_cannot_be_made_orthonormal_is_told_apart():
    u, s, v = factors(0.1, [3.0, 2.0, 1.0])
    flat = u.clone()
    flat[:, 1] = 0
    gram_u, gram_v = u.T @ u, v.T @ v
    cases = [
        (gram_u, s, gram_v), (flat.T @ flat, s, gram_v), (gram_u, s * torch.nan, gram_v),
        (gram_u * torch.inf, s, gram_v), (gram_u, s, gram_v * torch.nan), (gram_u, 0 * s, gram_v),
    ]  # fmt: skip
    found = rotations(*(torch.stack(x) for x in zip(*cases, strict=True)))
    for one in found:
        assert [bool(x.isnan().all()) for x in one] == [bool(x.isnan().any()) for x in one]
        assert [bool(x.isnan().all()) for x in one] == [False, True, True, True, True, False]
    for of_many, alone in zip(found, one_by_one(gram_u, s, gram_v), strict=True):
        torch.testing.assert_close(of_many[0], alone, rtol=0, atol=1e-13)


def setup(stage, how, precision="fp32"):
    """The DeepSpeed configuration of one of SETUPS."""
    ds = ds_config(stage, how.replace("small", "").strip(), CASE["clip"], CASE["accumulation"], precision == "bf16")
    if "small" in how:
        ds["zero_optimization"] |= {"sub_group_size": 150, "stage3_param_persistence_threshold": 250}
    if precision == "mixed":
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return ds


def check_model_holds_masters(engine):
    """Every parameter, whole, on every rank, is the masters rounded to its format."""
    import deepspeed

    parameters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    whole = whole_factors(engine)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        for fragment in engine.masters.fragments:
            mine = parameters[fragment.name].detach().reshape(-1)[fragment.start : fragment.start + fragment.numel]
            assert torch.equal(mine, fragment.values().to(mine.dtype)), fragment.name
        if torch.distributed.get_rank() == 0:
            for name, parameter in parameters.items():
                assert torch.equal(parameter, whole[name].to(parameter.dtype)), name


def _train(folder, setups, precision):
    """Train each setup; returns, on rank 0, masters at the start, before and after each re-orthonormalisation with its
    step, and at the end; and the log."""
    from sorsa_ds.runtime import collectives

    results = []
    for stage, how in setups:
        engine = build(folder, setup(stage, how, precision), CASE, precision)
        assert (engine._inner_steps > 3) == (how.startswith("small"))
        seen, apply = [], engine._reorthonormalizer.apply

        def recording(engine=engine, seen=seen, apply=apply):
            before = {n: x.clone() for n, x in whole_factors(engine).items()}
            apply()
            seen.append((engine.global_steps + 1, before, whole_factors(engine)))

        engine._reorthonormalizer.apply = recording
        start, log = whole_factors(engine), []
        for t in range(TAKEN):
            batch = sequences(MICRO * collectives.world_size(), seed=t)
            log.append(engine.train_step(micro_losses(engine, batch, 1)))
            if (t + 1) % EVERY == 0:
                check_model_holds_masters(engine)
        results.append((start, seen, whole_factors(engine), log))
        engine.destroy()
    return results


def check_turned(seen):
    """What was done, and when."""
    assert [step for step, _, _ in seen] == list(range(EVERY, TAKEN + 1, EVERY))
    for _, before, after in seen:
        for layer in (name[:-2] for name in before if name.endswith(".U")):
            (u0, s0, v0), (u1, s1, v1) = ([x[f"{layer}.{n}"].double() for n in "UsV"] for x in (before, after))
            product = (u0 * s0) @ v0.T
            assert ((u1 * s1) @ v1.T - product).norm() < 3e-7 * product.norm(), layer
            for x0, x1 in ((u0, u1), (v0, v1)):
                eye = torch.eye(x1.shape[1], dtype=torch.float64)
                assert (x1.T @ x1 - eye).norm() < 1e-6 < 1e-4 < (x0.T @ x0 - eye).norm(), layer


def distance(value, expected):
    """Relative."""
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("world", SETUPS)
def test_training_equals_plain_torch_on_every_stage(tiny_llama, world):
    results = run_ranks(world, _train, tiny_llama, SETUPS[world], "fp32")[0]
    for (stage, how), (start, seen, end, log) in zip(SETUPS[world], results, strict=True):
        check_turned(seen)
        layers = {name.rpartition(".")[0] for name in start}
        model = plain_model(tiny_llama, {layer: tuple(start[f"{layer}.{n}"] for n in "UsV") for layer in layers})
        plain_log = train(
            model, [sequences(MICRO * world, seed=t) for t in range(TAKEN)], rate=RATE, clip=CASE["clip"],
            coefficient=CASE["coefficient"], form=CASE["form"], reduction=CASE["reduction"], steps=STEPS,
            warmup=WARMUP, reorthonormalized=EVERY,
        )  # fmt: skip
        expected = {name: model.get_parameter(name).detach() for name in end}
        for name, value in end.items():
            assert distance(value, expected[name]) < COLUMN_GAP, f"stage {stage} {how}, {name}"
        for layer in layers:
            products = [(x[f"{layer}.U"] * x[f"{layer}.s"]) @ x[f"{layer}.V"].T for x in (end, expected)]
            assert distance(*products) < PRODUCT_GAP, f"stage {stage} {how}, {layer}"
        for ours, theirs in zip(log, plain_log, strict=True):
            assert ours.grad_norm == pytest.approx(theirs["grad_norm"], rel=1e-4)
            assert ours.reg_loss == pytest.approx(theirs["reg_loss"], rel=1e-3, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "setups"), [("mixed", [(2, "")]), ("bf16", [(0, ""), (1, ""), (3, "small")])])
def test_masters_turn_in_fp32_where_the_model_is_rounded(tiny_llama, precision, setups):
    for _, seen, _, _ in run_ranks(2, _train, tiny_llama, setups, precision)[0]:
        check_turned(seen)


NORM_CASE = dict(form="norm", reduction="mean", clip=0.05, coefficient=0.2, reorthonormalize=EVERY)
SEQUENCES = 12
"""Sequences of a global batch, whatever the number of ranks."""


def _same_batches(folder, setups):
    """Factors and reported numbers, on rank 0, after five steps with the norm form on the same global batches."""
    from sorsa_ds.runtime import collectives

    accumulation, results = SEQUENCES // (MICRO * collectives.world_size()), []
    for stage, how in setups:
        ds = setup(stage, how) | {"gradient_accumulation_steps": accumulation}
        engine = build(folder, ds, NORM_CASE)
        log = [
            engine.train_step(micro_losses(engine, sequences(SEQUENCES, seed=t), accumulation)) for t in range(TAKEN)
        ]
        results.append((whole_factors(engine), log))
        engine.destroy()
    return results


@pytest.mark.slow
def test_the_norm_form_does_not_follow_rounding_on_any_stage_or_number_of_ranks(tiny_llama):
    """At the start and after each re-orthonormalisation U and V are orthonormal but for rounding, which differs."""
    found = [one for world in (1, 2, 3) for one in run_ranks(world, _same_batches, tiny_llama, [(0, ""), (3, "")])[0]]
    expected, log = found[0]
    assert [one.reg_grad_norm > 0 for one in log] == [False, False, False, True, False]  # the first rate is 0
    for factors, told in found[1:]:
        for name, value in factors.items():
            assert distance(value, expected[name]) < 1e-5, name
        for ours, theirs in zip(told, log, strict=True):
            assert ours.reg_grad_norm == pytest.approx(theirs.reg_grad_norm, rel=1e-5)
            assert ours.reg_loss == pytest.approx(theirs.reg_loss, rel=1e-4, abs=1e-6)


def _dependent(folder):
    """A column of one U is another's double: what each rank says, and whether its masters moved."""
    engine = build(folder, ds_config(3, "", 0.0, 1), CASE)
    engine.train_step(micro_losses(engine, sequences(MICRO * 2), 1))
    u = next(f for f in engine.masters.fragments if f.name.endswith("q_proj.U"))
    rows = torch.arange(u.start, u.start + u.numel) % u.shape[1]
    u.values()[rows == 1] = 0
    before = [f.values().clone() for f in engine.masters.fragments]
    try:
        engine._reorthonormalizer.apply()
    except ValueError as error:
        still = all(torch.equal(f.values(), x) for f, x in zip(engine.masters.fragments, before, strict=True))
        return str(error), still
    return None


@pytest.mark.slow
def test_dependent_columns_stop_every_rank_alike(tiny_llama):
    for said, still in run_ranks(2, _dependent, tiny_llama):
        assert "regularizer.reorthonormalize: " in said
        assert "model.layers.0.self_attn.q_proj (1 matrices)" in said
        assert still


@pytest.mark.slow
def test_a_resumed_run_keeps_the_rhythm(project, capfd):
    settings = ["regularizer.reorthonormalize=3", "data.eval_size=6"]
    run, _ = train_run(project, "turned", *settings)
    assert "gamma / eta_d = 0.2; U and V made orthonormal every 3 steps" in capfd.readouterr().out
    assert metrics(run, "reg_loss")[3] < 1e-6 < 1e-4 < min(metrics(run, "reg_loss")[2], metrics(run, "reg_loss")[4])
    again = rewound(project, run, "turned-again", 4)  # the next time is after step 6
    with pytest.raises(AssertionError, match="regularizer.reorthonormalize was 3 and is now 2"):
        train_run(project, again.name, *settings, "regularizer.reorthonormalize=2", f"--resume={again}")
    train_run(project, again.name, *settings, "--resume=auto")
    assert metrics(again, "loss") == metrics(run, "loss")
    for name, tensor in trained(run).items():
        assert torch.equal(trained(again)[name], tensor), name
    moved = rewound(project, run, "turned-moved", 2)
    train_run(project, moved.name, *settings, "--resume=auto", ranks=3, ds="zero2")
    # Adam makes much of gradients that are nearly nothing: sums in another order differ by up to 6e-6 after four steps.
    for name, tensor in trained(run).items():
        assert (trained(moved)[name] - tensor).norm() <= 3e-5 * tensor.norm(), name
    assert metrics(moved, "reg_loss") == pytest.approx(metrics(run, "reg_loss"), rel=1e-2, abs=1e-6)


def test_the_setting_belongs_to_sorsa_and_is_off_by_default():
    assert resolve_regularizer(RegularizerConfig(), learning_rate=1e-3, accumulation_steps=1).rhythm() == ""
    config = RunConfig(method="pissa", regularizer=RegularizerConfig(reorthonormalize=4))
    with pytest.raises(ValueError, match="pissa has no use for regularizer.reorthonormalize=4"):
        check_settings(config, 2, resolve_precision("fp32", None, "cpu"))
