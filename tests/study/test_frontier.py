"""The frontier of a comparison: curves over learning rates, drift at equal loss, the table and the picture."""

import csv
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.study.compare import command, figure, tables
from sorsa_ds.study.compare.frontier import NotReached, Point, common_loss, drift_at, frontier_of
from sorsa_ds.study.compare.options import parse
from sorsa_ds.study.compare.results import Result, by_method
from sorsa_ds.study.compare.runner import Runner
from sorsa_ds.study.compare.score import Evaluation
from sorsa_ds.study.compare.trials import METHODS, Trial
from tests.helpers.forked import run_forked
from tests.helpers.projects import settings

DOWN = [Point(1e-3, 3.0, 0.1), Point(2e-3, 2.8, 0.4), Point(4e-3, 2.6, 1.6), Point(8e-3, 2.9, 6.4)]
"""A method whose last rate is too high."""


@pytest.mark.parametrize(
    ("loss", "drift"),
    [
        (3.0, 0.1),  # a point itself
        (2.8, 0.4),
        (2.6, 1.6),
        (2.9, 0.2),  # half of the way from 0.1 to 0.4, in logarithms: sqrt(0.1 · 0.4)
        (2.85, 0.1 * 4**0.75),  # three quarters of it
        (2.7, 0.8),  # sqrt(0.4 · 1.6), and not what lies behind the best rate
    ],
)
def test_drift_is_interpolated_on_the_way_down_by_its_logarithm(loss, drift):
    assert drift_at(DOWN, loss) == pytest.approx(drift, rel=1e-9)


def test_where_a_drift_is_0_it_is_interpolated_itself():
    assert drift_at([Point(1e-4, 3.0, 0.0), Point(1e-3, 2.0, 0.8)], 2.25) == pytest.approx(0.6)


def test_a_loss_before_the_first_rate_or_below_the_best_is_not_reached():
    with pytest.raises(NotReached, match=r"lowest learning rate, 0\.001, ends at 3\.0000 already, below 3\.1000; add"):
        drift_at(DOWN, 3.1)
    with pytest.raises(NotReached, match=r"lowest loss is 2\.6000, above 2\.5000"):
        drift_at(DOWN, 2.5)
    with pytest.raises(NotReached, match="ends at"):
        drift_at([Point(1e-3, 2.7, 1.0), Point(2e-3, 2.9, 2.0)], 2.8)  # reached on the way up alone


def test_the_common_loss_is_the_highest_of_the_lowest():
    other = [Point(1e-3, 2.9, 0.2), Point(2e-3, 2.7, 0.3)]
    assert common_loss({"a": DOWN, "b": other}) == 2.7
    assert common_loss({"a": DOWN}) == 2.6


def run(method: str, rate: float, seed: int, loss: float, drift: float | None) -> Result:
    report = {"eval_loss_start": 4.0, "eval_loss_end": loss, "loss_last": loss, "world_size": 1, "steps": 3}
    return Result(Trial(method, rate, seed), Path("none"), {**report, "versions": {}}, drift)


def runs_of_two_seeds() -> list[Result]:
    """LoRA and SORSA with seeds 4 and 5 at all rates, and with seed 6 at one of them."""
    return [
        run("lora", 2e-3, 4, 2.6, 0.4), run("lora", 1e-3, 4, 3.0, 0.1), run("lora", 1e-3, 5, 3.2, 0.2),
        run("lora", 2e-3, 5, 2.8, 0.2), run("sorsa", 1e-3, 4, 2.9, 0.3), run("sorsa", 2e-3, 4, 2.8, 0.6),
        run("sorsa", 1e-3, 5, 2.9, 0.5), run("sorsa", 2e-3, 5, 2.7, 0.7), run("lora", 2e-3, 6, 2.0, 9.0),
    ]  # fmt: skip


def test_methods_are_compared_seed_by_seed_at_the_loss_that_all_reach():
    frontier = frontier_of(runs_of_two_seeds(), ["sorsa", "pissa", "lora"], 4)
    assert frontier.losses == {4: 2.8, 5: 2.8}
    sorsa, lora = frontier.at_equal_loss
    assert (sorsa.method, lora.method) == ("sorsa", "lora")
    assert sorsa.drifts == pytest.approx({4: 0.6, 5: math.sqrt(0.5 * 0.7)})
    assert lora.drifts == pytest.approx({4: 0.2, 5: 0.2})
    assert sorsa.spread.mean == pytest.approx((0.6 + math.sqrt(0.35)) / 2)
    assert sorsa.spread.deviation == pytest.approx(statistics.stdev([0.6, math.sqrt(0.35)]))
    assert sorsa.reasons == lora.reasons == {}
    assert frontier.mean_curve("lora") == [Point(1e-3, pytest.approx(3.1), pytest.approx(0.15)),
                                           Point(2e-3, pytest.approx(2.7), pytest.approx(0.3))]  # fmt: skip
    assert len(frontier.curves["lora"][6]) == 1


def test_a_seed_without_all_rates_gives_no_spread_and_runs_without_a_score_count_as_none():
    runs = runs_of_two_seeds()
    runs[2] = replace(runs[2], score=None)
    frontier = frontier_of(runs, ["sorsa", "lora"], 4)
    assert frontier.seeds == [4]
    assert frontier.at_equal_loss[1].spread.deviation is None
    assert frontier_of([replace(one, score=None) for one in runs], ["sorsa", "lora"], 4) is None


def comparison_of(runs: list[Result], methods: list[str]) -> tables.Comparison:
    frontier = frontier_of(runs, methods, 4)
    best = by_method(runs, methods, lambda _: 2e-3)
    return tables.Comparison(RunConfig(), Evaluation("drift", ""), 0.0, best, runs, {}, {}, 4, frontier)


def test_the_tables_have_drift_at_equal_loss_or_a_dash_with_the_reason(tmp_path):
    runs = [*runs_of_two_seeds(), run("full", 1e-3, 4, 2.5, 0.2), run("full", 2e-3, 4, 2.4, 0.3)]
    runs += [run("full", 1e-3, 5, 2.5, 0.2), run("full", 2e-3, 5, 2.4, 0.3)]
    comparison = comparison_of(runs, ["sorsa", "lora", "full"])
    tables.write_tables(comparison, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    for told in (
        "## Drift at equal held-out loss", "2.8000 (seeds with all learning rates: 4, 5)",
        "| lora | 0.2000 ± 0.0000 | 4, 5 |",
        "| full | - | - |", "- full, seed 4: the lowest learning rate, 0.001, ends at 2.5000 already, below 2.8000",
        "![held-out loss against drift](frontier.png)", "| lora | 0.001 | 4, 5 | 3.1000 ± 0.1414 | 0.1500 ± 0.0707 |",
        "drift, nats per token, before | drift, nats per token, after", "| 0.0000 | 0.6500 ± 0.0707 |",
    ):  # fmt: skip
        assert told in text, told
    lines = {row["method"]: row for row in csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines())}
    assert float(lines["lora"]["drift_at_equal_loss"]) == pytest.approx(0.2)
    assert float(lines["sorsa"]["equal_loss"]) == pytest.approx(2.8)
    assert float(lines["sorsa"]["drift_at_equal_loss_deviation"]) > 0
    assert (lines["full"]["drift_at_equal_loss"], lines["full"]["drift_at_equal_loss_seeds"]) == ("", "0")
    told = json.loads((tmp_path / "comparison.json").read_text())["frontier"]
    assert told["equal_loss"] == {"4": 2.8, "5": 2.8}
    assert told["drift_at_equal_loss"][1]["by_seed"] == pytest.approx({"4": 0.2, "5": 0.2})
    assert told["curves"]["lora"]["4"][0] == {"learning_rate": 1e-3, "loss": 3.0, "drift": 0.1}


def test_a_comparison_without_drift_has_no_frontier():
    comparison = replace(comparison_of(runs_of_two_seeds(), ["sorsa", "lora"]), frontier=None)
    assert "equal held-out loss" not in tables.markdown(comparison)
    assert tables.as_json(comparison)["frontier"] is None
    assert "equal_loss" not in tables.as_csv(comparison)


def test_the_picture_names_its_curves_and_can_be_read_without_colours(tmp_path):
    frontier = frontier_of(runs_of_two_seeds(), ["sorsa", "lora"], 4)
    figure.draw_frontier(frontier, tmp_path)
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "frontier.svg").read_text()
    for told in (">sorsa<", ">lora<", "held-out loss (nats per token)", "drift: KL(base || tuned)", ">2.8<"):
        assert told in drawn, told
    assert len({figure.LOOKS[method][1:] for method in METHODS}) == len(METHODS)


def test_names_that_would_touch_are_moved_apart_in_order():
    assert figure.spaced({"a": 0.5, "b": 0.1}, 0.1) == {"b": 0.1, "a": 0.5}
    assert figure.spaced({"a": 0.5, "b": 0.5, "c": 0.52}, 0.1) == pytest.approx({"a": 0.5, "b": 0.6, "c": 0.7})
    assert figure.spaced({"a": 0.95, "b": 1.0}, 0.1) == pytest.approx({"a": 0.9, "b": 1.0})


def test_which_seeds_run_at_all_rates_is_asked_of_the_user():
    assert not parse(["--methods=lora", "--output=x"]).every_seed
    assert parse(["--methods=lora", "--output=x", "--rate_seeds=all"]).every_seed
    with pytest.raises(ValueError, match="--rate_seeds: 'some' is neither first nor all"):
        parse(["--methods=lora", "--output=x", "--rate_seeds=some"])


@pytest.mark.slow
def test_a_comparison_by_drift_ends_with_the_figure_and_the_table(project, tmp_path, monkeypatch):
    """Real runs and evaluations, in forked ranks in place of DeepSpeed's launcher, which would take minutes."""

    def launch(self: Runner, script: str, arguments: list[str], name: str, meanwhile) -> None:
        run_forked(project, [f"launch/{script}", *arguments])

    monkeypatch.setattr(Runner, "launch", launch)
    own = ("output.folder", "output.name", "train.learning_rate")  # the comparison sets them
    arguments = [
        "--methods=sorsa,lora", "--seeds=1", "--learning_rates=1e-3,1e-2", f"--output={tmp_path}", "--task=drift",
        "--task_options=--samples 4 --sample_tokens 16 --dtype fp32",
        *(word for word in settings(project, "unused") if not word.startswith(own)),
    ]  # fmt: skip
    command.compare(parse(arguments))
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["score_before"] == 0, "the base model has not moved from itself"
    assert len(told["runs"]) == 4
    for one in told["runs"]:
        measured = json.loads(next(tmp_path.glob(f"evaluations/*/{Path(one['folder']).name}/results.json")).read_text())
        assert one["score"] == measured["kl"] > 0
        assert measured["samples"] == 4
    assert len({file.read_text() for file in (project / "cache" / "base_samples").glob("*.json")}) == 1
    assert set(told["frontier"]["equal_loss"]) == {"1"}
    for method in ("sorsa", "lora"):
        assert [point["learning_rate"] for point in told["frontier"]["curves"][method]["1"]] == [1e-3, 1e-2]
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert any(line.startswith("| method | drift at equal loss | seeds |") for line in lines)
    assert {file.name for file in tmp_path.glob("frontier.*")} == {"frontier.png", "frontier.svg"}
