"""The study's plan and its statistics, on rows that are made up, against numbers computed by hand."""

import math
from dataclasses import replace

import pytest

from benchmarks.helpers.evidence_contrasts import CONTRASTS, Contrast, contrast_table
from benchmarks.helpers.evidence_figures import draw
from benchmarks.helpers.evidence_summary import Interval, against_lora, runs_of, summary
from benchmarks.helpers.evidence_tables import tables
from benchmarks.helpers.evidence_trials import PARTS, Part, Trial, best_rates, due

RATES = {"lora": (1e-3, 2e-3, 4e-3, 8e-3), "trailing": (1e-2, 2e-2, 4e-2)}
PART = Part("small-gsm8k", "small", 8, 3, ("lora", "trailing"), (), RATES, (1, 1))
SETTLED = replace(PART, settled=True, rates={"lora": RATES["lora"][:3], "trailing": RATES["trailing"]})


def row(variant, rate, seed, loss, drift=1.0):
    return {
        "part": PART.name, "variant": variant, "learning_rate": str(rate), "seed": str(seed),
        "eval_loss": str(loss), "drift": str(drift), "english": str(3 + drift), "english_base": "3.5", "code": "5",
        "code_base": "6", "choices": "0.5", "choices_base": "0.25", "change": "0.1", "delta_sigma": "0.2",
        "delta_d": "0.3", "kappa_W": str(100 * (1 + seed**9)), "kappa_U": "1.5",
        "orthonormality": "0.25" * (variant != "lora"),
    }  # fmt: skip


def trial(variant, rate, seed):
    return Trial(PART.name, variant, rate, seed)


def test_a_variant_is_run_beyond_its_best_rate_and_then_with_the_other_seeds_beside_it():
    assert due(PART, {}) == [trial(v, rate, 0) for v, rates in RATES.items() for rate in rates]
    losses = {trial("lora", rate, 0): loss for rate, loss in zip(RATES["lora"], (4, 3, 2, 5), strict=True)}
    assert due(PART, losses) == [trial("trailing", rate, 0) for rate in RATES["trailing"]]
    losses |= {trial("trailing", rate, 0): loss for rate, loss in zip(RATES["trailing"], (1, 2, 3), strict=True)}
    assert due(PART, losses) == [trial("trailing", 7.1e-3, 0)], "the other seeds wait for a rate below the best"
    losses[trial("trailing", 7.1e-3, 0)] = 1.5
    more = due(PART, losses)
    assert [t.learning_rate for t in more if (t.variant, t.seed) == ("lora", 1)] == [1e-3, 2e-3, 4e-3, 8e-3]
    assert [t.learning_rate for t in more if (t.variant, t.seed) == ("trailing", 2)] == [7.1e-3, 1e-2, 2e-2]
    assert len(more) == 2 * (4 + 3)
    losses |= {t: losses[trial(t.variant, t.learning_rate, 0)] for t in more}
    assert due(PART, losses) == []
    losses |= {trial("trailing", 2e-2, seed): 0.25 for seed in (1, 2)}
    beyond = due(PART, losses)
    assert [(t.variant, t.learning_rate, t.seed) for t in beyond] == [("trailing", 4e-2, 1), ("trailing", 4e-2, 2)]
    assert due(PART, losses | dict.fromkeys(beyond, 3.0)) == []


@pytest.mark.parametrize(("loss", "followed"), [(2.04, True), (2.06, False)])
def test_other_variants_come_last_and_are_followed_where_they_are_close(loss, followed):
    rates = {"lora": (1e-3, 2e-3, 4e-3), "dora": (1e-3, 2e-3, 4e-3)}
    part = Part("small-gsm8k", "small", 8, 2, ("dora", "lora"), (), rates, (1, 1))
    assert [t.variant for t in due(part, {})] == ["lora"] * 3
    losses = {trial("lora", rate, seed): 2 + abs(rate - 2e-3) for rate in rates["lora"] for seed in (0, 1)}
    assert due(part, losses) == [trial("dora", rate, 0) for rate in rates["dora"]]
    losses |= {trial("dora", rate, 0): loss + abs(rate - 2e-3) for rate in rates["dora"]}
    assert due(part, losses) == ([trial("dora", 2e-3, 1)] if followed else [])
    alone = replace(part, variants=("dora",))
    assert due(alone, {t: loss for t, loss in losses.items() if t.variant == "dora"}) == [trial("dora", 2e-3, 1)]


def test_a_settled_part_looks_for_no_rate():
    rates = {"lora": (1.0,), "dora": (2.0,)}
    part = Part("small-few-fresh", "small", 8, 2, ("lora", "dora"), (), rates, (1, 1), settled=True)
    wanted = [Trial(part.name, variant, rate, seed) for seed in (0, 1) for variant, [rate] in rates.items()]
    assert due(part, {}) == wanted
    assert due(part, dict.fromkeys(wanted[:3], 0.5)) == wanted[3:]


def test_the_seeds_of_a_part_learn_lines_of_their_own():
    slices = [Trial("small-few-fresh", "lora", 3.6e-3, seed).settings()[-1] for seed in range(2)]
    assert slices == ["data.train_split=train[296:592]", "data.train_split=train[592:888]"]
    assert "data.train_split=train[:296]" in PARTS["small-few"].settings, "these found the rates"
    assert not any("train_split" in word for word in Trial("small-gsm8k", "lora", 1e-2, 1).settings())
    fresh, found = PARTS["small-gsm8k-fresh"], PARTS["small-gsm8k"]
    assert (fresh.settings, fresh.first_seed) == (found.settings, found.seeds), "seeds that had no share in the rates"
    assert "train.seed=6" in Trial(fresh.name, "lora", 1e-2, 1).settings()


def test_a_rate_that_lacks_a_seed_is_not_the_best():
    losses = {trial("lora", 1e-3, 0): 0.5, **{trial("lora", 2e-3, seed): 1.0 for seed in range(3)}}
    assert best_rates(PART, losses) == {"lora": 2e-3}


def test_students_interval():
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert Interval.of([2.0]) == Interval(2.0, None, None, 1) and Interval.of([]) is None


def rows(gaps, ratio):
    """LoRA's curves, and trailing ones that are `gaps` lower in loss and have `ratio` times the drift at equal loss."""
    found = []
    for seed, gap in enumerate(gaps):
        for rate, loss, drift in zip(RATES["lora"][:3], (3.0, 2.0, 2.5), (0.5, 1.0, 2.0), strict=True):
            found.append(row("lora", rate, seed, loss, drift))
        for rate, loss, drift in zip(
            RATES["trailing"], (3.0, 2.0 - gap, 2.5), (0.5 * ratio, 1.0 * ratio, 2), strict=True
        ):
            found.append(row("trailing", rate, seed, loss, drift))
    return found


def test_variants_are_paired_with_lora_by_seed():
    lora, trailing = against_lora(PART, rows((0.0, 0.0, 0.0), 0.5))
    assert (lora.rate, lora.loss, lora.drift, lora.drift_ratio.mean) == (2e-3, 2.0, 1.0, 1.0)
    assert trailing.rate == 2e-2 and trailing.loss_difference.mean == 0
    assert trailing.drift_ratio.mean == pytest.approx(0.5) and trailing.drift_ratio.seeds == 3
    _, lower = against_lora(PART, rows((0.1, 0.2, 0.3), 1.0))
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert lower.loss_difference.mean == pytest.approx(-0.2)
    assert lower.loss_difference.low == pytest.approx(-0.2 - half, rel=1e-5)
    # At a loss of 2.01 LoRA has gone 0.99 of the way from drift 0.5 to 1.0, the trailing curve 0.99 / (1 + gap) of it.
    expected = math.exp(sum(math.log(2 ** (0.99 / (1 + gap) - 0.99)) for gap in (0.1, 0.2, 0.3)) / 3)
    assert lower.drift_ratio.mean == pytest.approx(expected)


def test_a_curve_that_begins_below_the_common_loss_is_counted_as_missing():
    some = [r for r in rows((0.5, 0.5, 0.5), 1.0) if (r["variant"], r["learning_rate"]) != ("trailing", "0.01")]
    _, trailing = against_lora(PART, some)
    assert trailing.drift_ratio is None and trailing.missing == 3


def test_the_best_variant_is_the_one_with_the_lowest_loss_and_methods_are_none(monkeypatch):
    more = replace(PART, variants=("lora", "pissa", "trailing", "sorsa"))
    monkeypatch.setitem(PARTS, PART.name, more)
    others = [row(v, 1e-3, seed, loss, 0.1) for v, loss in (("pissa", 1.0), ("sorsa", 3.0)) for seed in range(3)]
    told = summary(rows((-0.1, -0.11, -0.12), 0.1) + others)
    assert told["best_variant"] == "trailing" and told["loss_vs_lora"]["low"] > 0
    assert summary([])["best_variant"] is None


def test_the_line_of_json_has_the_best_variant_with_its_intervals(monkeypatch):
    monkeypatch.setitem(PARTS, PART.name, PART)
    told = summary(rows((0.1, 0.2, 0.3), 0.5))
    assert (told["runs"], told["seeds"], told["parts"], told["best_variant"]) == (18, 3, [PART.name], "trailing")
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert told["loss_vs_lora"] == pytest.approx({"mean": -0.2, "low": -0.2 - half, "high": -0.2 + half, "seeds": 3})
    # At a loss of 2.01 LoRA has gone 0.99 of its way from drift 0.5 to 1.0, the trailing curve has begun at half of it.
    logs = [math.log(0.5 * 2 ** (0.99 / (1 + gap) - 0.99)) for gap in (0.1, 0.2, 0.3)]
    drift = told["drift_vs_lora_at_equal_loss"]
    assert drift["mean"] == pytest.approx(math.exp(sum(logs) / 3)) and drift["low"] < drift["mean"] < drift["high"]
    assert told["by_part"][PART.name] == {key: told[key] for key in told["by_part"][PART.name]}


def test_a_settled_part_is_told_variant_by_variant_and_is_not_read_at_equal_loss(monkeypatch):
    monkeypatch.setitem(PARTS, PART.name, SETTLED)
    told = summary(rows((0.1, 0.2, 0.3), 0.5))
    assert (told["by_part"], told["best_variant"]) == ({}, None)
    [(variant, found)] = told["settled"][PART.name].items()
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert variant == "trailing"
    assert found["loss_vs_lora"] == pytest.approx({"mean": -0.2, "low": -0.2 - half, "high": -0.2 + half, "seeds": 3})
    assert found["learning_rate"] == 2e-2
    assert found["drift_vs_lora"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5, "seeds": 3})
    assert "| trailing | **-0.200**, - |" in tables(rows((0.199, 0.2, 0.201), 0.5))
    best_of_lora = ("lora", "0.002", "2")
    lacking = [r for r in rows((0.1, 0.2, 0.3), 0.5) if (r["variant"], r["learning_rate"], r["seed"]) != best_of_lora]
    assert len(lacking) == 17 and summary(lacking)["settled"] == {}, "another rate would pass for LoRA's best"


def test_contrasts_are_of_the_rates_that_are_named(monkeypatch):
    monkeypatch.setitem(CONTRASTS, PART.name, (Contrast("trailing", 2e-2, "lora", 1e-3),))
    behind = rows((-0.1, -0.1, -0.1), 0.5)
    *_, line = contrast_table(SETTLED, runs_of(SETTLED, behind)).splitlines()
    # LoRA's curve at the variant's own loss of 2.1 has gone 0.9 of the way from drift 0.5 to 1.0.
    at_its_loss = f"{0.5 / 2 ** (0.9 - 1):.2f}"
    assert line == (
        "| trailing 0.02 | lora 0.001 | -0.900 (-0.900 to -0.900) | 1.00 (1.00 to 1.00) "
        f"| {at_its_loss} ({at_its_loss} to {at_its_loss}) | +0.000 (+0.000 to +0.000) | +0.000 (+0.000 to +0.000) |"
    )
    assert contrast_table(SETTLED, runs_of(SETTLED, behind[:-2])) == "", "a contrast with a run missing is not told"
    # Where rates were looked for, both curves are read, at 2.11; the variant's has come 0.89 / 0.9 of its way there.
    both = f"{0.5 * 2 ** (0.89 / 0.9 - 0.89):.2f}"
    assert f"| {both} ({both} to {both}) |" in contrast_table(PART, runs_of(PART, behind))


def test_only_parts_with_curves_have_a_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(PARTS, PART.name, PART)
    assert [path.name for path in draw(rows((0.1, 0.2, 0.3), 0.5), tmp_path)] == ["evidence-small-gsm8k.png"]
    at_one_rate = [
        one for one in rows((0.1, 0.2, 0.3), 0.5) if one["variant"] == "lora" or one["learning_rate"] == "0.02"
    ]
    assert draw(at_one_rate, tmp_path) == []
    monkeypatch.setitem(PARTS, PART.name, SETTLED)
    assert draw(rows((0.1, 0.2, 0.3), 0.5), tmp_path) == []


def test_the_tables_tell_texts_and_spectra_at_the_best_rates(monkeypatch):
    """Student's interval of equal differences has no width; an ill-conditioned seed leaves the median alone."""
    monkeypatch.setitem(PARTS, PART.name, PART)
    told = tables(rows((0.0, 0.0, 0.0), 0.5)).splitlines()
    for line in (
        "| trailing | +0.000, **0.50** |",
        "| trailing | 0.02 | 2.0000 | +0.0000 (+0.0000 to +0.0000) | 0.500 | 0.50 (0.50 to 0.50) "
        "| 0.50 (0.50 to 0.50), 3 seeds |",
        "### small-gsm8k: 3 seeds, rank 8",
        "| the base model | 3.500 | | 6.000 | 0.25 |",
        "| lora | 4.000 |  | 5.000 | 0.50 |",
        "| trailing | 3.500 | -0.500 (-0.500 to -0.500) | 5.000 | 0.50 |",
        "| lora | 0.100 | 0.200 | 0.300 | 200 | - | - |",
        "| trailing | 0.100 | 0.200 | 0.300 | 200 | 0.25 | 1.500 |",
    ):
        assert line in told, told


def test_the_regulariser_is_judged_at_one_rate_and_seed_by_seed(monkeypatch):
    part = Part("small-gsm8k", "small", 8, 2, ("lora", "trailing", "trailing-no-reg"), (), {}, (1, 1))
    monkeypatch.setitem(PARTS, part.name, part)
    both = [
        row(variant, rate, seed, 2 + seed - gap, 1 - 2 * gap)
        for variant, gap in (("lora", 0.0), ("trailing", 0.1), ("trailing-no-reg", 0.0))
        for rate in (1e-2, 2e-2)
        for seed in (0, 1)
        if (variant, rate, seed) != ("trailing-no-reg", 2e-2, 1)
    ]
    told = tables(both)
    assert "| trailing | 0.01 | -0.100 (-0.100 to -0.100) | -0.200 (-0.200 to -0.200) |" in told
    assert "| trailing | 0.02 | -0.1" not in told, "a pair of one seed is missing"
