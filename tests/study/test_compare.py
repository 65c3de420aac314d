"""Comparisons: what is run, in which order, through the real commands; stopped, continued, and in figures."""

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sorsa_ds.config.schema import AdapterConfig, BaselineConfig, RegularizerConfig, RunConfig, SorsaConfig, TrainConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.methods.registry import VARIANTS
from sorsa_ds.runtime import plotting
from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.study.compare import command, figure, tables
from sorsa_ds.study.compare.options import OPTIONS, parse
from sorsa_ds.study.compare.results import MethodResult, Result, Spread, best_rate, by_method
from sorsa_ds.study.compare.runner import Runner
from sorsa_ds.study.compare.score import Evaluation
from sorsa_ds.study.compare.trials import METHODS, Trial, read_learning_rates, read_methods, read_seeds
from tests.helpers.projects import ROOT

STEPS = 30


def test_the_help_names_every_method_under_another_name():
    assert all(variant in OPTIONS["methods"] for variant in VARIANTS)


def test_learning_rates_are_for_all_methods_or_for_one():
    methods = ["sorsa", "lora"]
    assert read_learning_rates("", methods, 2e-4) == {"sorsa": [2e-4], "lora": [2e-4]}
    assert read_learning_rates("1e-4,3e-4", methods, 1.0) == {"sorsa": [1e-4, 3e-4], "lora": [1e-4, 3e-4]}
    found = read_learning_rates("1e-4,3e-4,lora=1e-3,lora=3e-3", methods, 1.0)
    assert found == {"sorsa": [1e-4, 3e-4], "lora": [1e-3, 3e-3]}
    assert read_learning_rates("lora=1e-3", methods, 2e-4) == {"sorsa": [2e-4], "lora": [1e-3]}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: read_methods("sorsa,lara"), "there is no 'lara'; there are sorsa, lora"),
        (lambda: read_methods("sorsa,sorsa"), "sorsa is named twice"),
        (lambda: read_methods(""), "nothing is named"),
        (lambda: read_seeds("1,-2"), "no list of integers"),
        (lambda: read_seeds("3,3"), "3 is named twice"),
        (lambda: read_learning_rates("pissa=1e-3", ["lora"], 1.0), "'pissa' is none of --methods lora"),
        (lambda: read_learning_rates("1e-3,fast", ["lora"], 1.0), "'fast' is no number > 0"),
        (lambda: read_learning_rates("1e30", ["lora"], 1.0), "'1e30' is no number > 0 and <= 1,000"),
        (lambda: read_seeds("4294967296"), "4294967296 is no integer from 0 to 4,294,967,295"),
        (lambda: read_seeds("1" * 5000), "is no list of integers from 0"),
        (lambda: read_learning_rates("inf", ["lora"], 1.0), "no number > 0"),
        (lambda: read_learning_rates("0.001,1e-3", ["lora"], 1.0), "named twice"),
    ],
)
def test_bad_lists_are_refused_by_name(read, message):
    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=lora"], "--output is missing"),
        (["--output=x"], "--methods is missing"),
        (["--methods=lora", "--output=x", "method=lora"], "method: a comparison sets it by --methods"),
        (["--methods=lora", "--output=x", "train.seed=3"], "train.seed: a comparison sets it by --seeds"),
        (["--methods=lora", "--output=x", "output.name=y"], "output.name: a comparison sets it by --output"),
        (["--methods=lora", "--output=x", "--task=life"], "a comparison measures no 'life', but gsm8k"),
        (["--methods=lora", "--output=x", "--task_options=--limit 3"], "there is no --task"),
        (["--methods=lora", "--output=x", "--task=math", "--task_options=--model=y"], "--model=y is set by"),
        (["--methods=lora", "--output=x", "--task=math", "--task_options=--data 'y"], "No closing quotation"),
        (["--methods=lora", "--output=x", "--num_gpus=0"], "'0' is no integer from 1 to 999,999"),
        (["--methods=lora", "--output=x", "sorsa.rnak=3"], "did you mean .*adapter.rank"),
        (["--methods=lora,full", "--output=x", "sorsa.svd=exact"], "none of the methods lora, full has .* sorsa.svd"),
    ],
)
def test_a_bad_command_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_what_some_methods_use_or_a_file_sets_is_left_out_of_the_others(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("sorsa: {svd: exact}\n")
    request = parse(["--methods=lora,full", "--output=x", f"--config={file}", "adapter.rank=8"])
    assert request.left_out("full") == {"adapter.rank": 8, "sorsa.svd": "exact"}
    assert request.left_out("lora") == {"sorsa.svd": "exact"}


def test_a_later_run_that_could_not_be_made_is_refused_before_the_first(tmp_path):
    arguments = ["--methods=lora,adalora", f"--output={tmp_path}", f"--ds_config={ROOT}/ds_configs/zero3.json"]
    with pytest.raises(ValueError, match="adalora needs ZeRO stage 0, 1 or 2"):
        command.compare(parse(arguments))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sorsa",
    [SorsaConfig(triplets="null_space", directions="file"), SorsaConfig(triplets="window", window_start=3)],
)
def test_settings_that_go_together_are_left_out_of_other_methods_together(sorsa):
    config = Trial("lora", 1e-3, 5).config(RunConfig(sorsa=sorsa), Path("/out"))
    assert config.sorsa == SorsaConfig()
    assert Trial("sorsa", 1e-3, 5).config(RunConfig(sorsa=sorsa), Path("/out")).sorsa == sorsa


def test_runs_differ_in_method_rate_and_seed_alone():
    base = RunConfig(
        adapter=AdapterConfig(rank=4), sorsa=SorsaConfig(svd="exact"), baseline=BaselineConfig(adalora_beta1=0.9),
        regularizer=RegularizerConfig(gamma="0.1*lr"), train=TrainConfig(steps=7),
    )  # fmt: skip
    for method in METHODS:
        trial = Trial(method, 1e-3, 5)
        config = trial.config(base, Path("/out"))
        assert (config.train, config.output.name) == (replace(base.train, learning_rate=1e-3, seed=5), trial.name)
        assert config.data == base.data
        ours = method.startswith("sorsa")
        assert config.method == ("sorsa" if ours else method)
        assert (config.sorsa.svd == "exact") == ours
        assert (config.baseline == base.baseline) == (method == "adalora")
        assert config.regularizer.gamma == {"sorsa": "0.1*lr", "sorsa-no-reg": 0.0}.get(method)
    assert Trial("lora", 1e-3, 5).left_out(base) == {
        "sorsa.svd": "exact", "baseline.adalora_beta1": 0.9, "regularizer.gamma": "0.1*lr",
    }  # fmt: skip


def result(method: str, rate: float, seed: int, folder: Path, held_out: float | None, loss: float) -> Result:
    """A run as its folder would tell."""
    report = {
        "loss_last": loss, "eval_loss_start": None if held_out is None else 3.0, "eval_loss_end": held_out,
        "train_seconds": 10.0 * seed, "tokens_per_second": 100.0, "peak_memory_gib": 1.5,
        "trainable_parameters": 1000, "world_size": 2, "steps": 4, "versions": {"torch": "2"},
    }  # fmt: skip
    folder = folder / f"{method}-{rate}-{seed}"
    folder.mkdir(exist_ok=True)
    lines = [{"step": t, "loss": loss + 1 / t, "grad_norm": seed / t} for t in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.json").write_text(json.dumps(report))
    return Result.read(Trial(method, rate, seed), folder)


@pytest.fixture
def runs(tmp_path):
    """Two methods; SORSA's rates were tried with seed 1."""
    return [
        result("sorsa", 1e-3, 1, tmp_path, 2.0, 1.9), result("sorsa", 3e-3, 1, tmp_path, 1.5, 1.95),
        result("sorsa", 3e-3, 2, tmp_path, 1.7, 1.6), result("lora", 1e-3, 1, tmp_path, 1.8, 1.7),
    ]  # fmt: skip


def methods_of(runs) -> list[MethodResult]:
    """Summarise runs by method, as a comparison does."""
    return by_method(runs, ["sorsa", "pissa", "lora"], lambda method: best_rate(runs, method, 1))


def test_the_best_rate_is_that_of_the_lowest_held_out_loss_with_the_first_seed(runs, tmp_path):
    assert best_rate(runs, "sorsa", 1) == 3e-3  # its training loss is the higher one
    assert best_rate(runs, "sorsa", 2) == 3e-3
    assert best_rate(runs, "pissa", 1) is None
    blind = [result("lora", rate, 3, tmp_path, None, loss) for rate, loss in ((1e-3, 2.0), (1e-2, 1.0), (1e-1, 3.0))]
    assert best_rate(blind, "lora", 3) == 1e-2


def test_tables_hold_means_and_deviations_over_seeds(runs, tmp_path):
    runs[1:3] = [replace(run, score=percent) for run, percent in zip(runs[1:3], (30.0, 20.0), strict=True)]
    sorsa, lora = methods_of(runs)
    assert sorsa.spread("eval_loss_end") == Spread(1.6, statistics.stdev([1.5, 1.7]), 2)
    assert lora.spread("eval_loss_end") == Spread(1.8, None, 1)
    failed = {Trial("pissa", 1e-3, 1): "out of memory"}
    comparison = tables.Comparison(
        RunConfig(), Evaluation("gsm8k", ""), 20.0, [sorsa, lora], runs, failed, {"lora": {"sorsa.svd": "exact"}}, 1
    )
    tables.write_tables(comparison, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    for told in ("| sorsa | 0.003 | 1, 2 | 1.7750 ± 0.2475 | 3.0000 | 1.6000 ± 0.1414 | 15 ± 7 | 100 | 1.50 |",
                 " 1,000 | 20.00 | 25.00 ± 7.07 |",
                 "| lora | 0.001 | 1 | 1.7000 | 3.0000 | 1.8000 | 10 | 100 | 1.50 | 1,000 | 20.00 | - |",
                 "| sorsa | 2.0000 | 1.5000 |", "- pissa-lr0.001-seed1 failed: out of memory",
                 "- lora has no use for sorsa.svd=exact"):  # fmt: skip
        assert told in text, told
    first, second = csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines())
    assert (first["method"], float(first["eval_loss_end"])) == ("sorsa", pytest.approx(1.6))
    assert float(first["eval_loss_end_deviation"]) == pytest.approx(statistics.stdev([1.5, 1.7]))
    assert second["eval_loss_end_deviation"] == ""
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert [len(data[key]) for key in ("methods", "runs", "failed")] == [2, 4, 1]


def test_runs_on_other_numbers_of_ranks_are_pointed_out(runs):
    runs[0].report["world_size"] = 4
    text = tables.markdown(tables.Comparison(RunConfig(), None, None, methods_of(runs), runs, {}, {}, 1))
    assert "different numbers of ranks (2, 4)" in text


def test_the_picture_has_means_bands_and_names(runs, tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 9))
    expected = [[row[max(0, t - 3) : t].mean() for t in range(1, 10)] for row in values]
    np.testing.assert_allclose(plotting.smoothed(values, 3), expected)
    np.testing.assert_allclose(plotting.smoothed(values, 1), values)
    figure.draw_comparison(methods_of(runs), tmp_path)
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "comparison.svg").read_text()
    for told in ("sorsa (rate 0.003)", "lora (rate 0.001)", "training loss (nats per token)", "gradient norm", "step",
                 "lowest to highest"):  # fmt: skip
        assert told in drawn, told
    assert len(set(figure.LOOKS.values())) == len(METHODS)


def test_a_run_made_with_other_settings_is_not_taken_for_this_one(tmp_path):
    base, json_file = RunConfig(train=TrainConfig(steps=5)), ROOT / "ds_configs" / "zero2.json"
    trial = Trial("lora", 1e-3, 1)
    runner = Runner(base, json_file, tmp_path, None)
    runner.check_unchanged(trial)
    folder = runner.folder(trial)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(trial.config(base, tmp_path)))
    (folder / "ds_config.given.json").write_text(json_file.read_text())
    (folder / "report.json").write_text("{}")
    runner.check_unchanged(trial)
    with pytest.raises(ValueError, match="other settings: train.steps was 5 and is now 6"):
        Runner(replace(base, train=TrainConfig(steps=6)), json_file, tmp_path, None).check_unchanged(trial)
    with pytest.raises(ValueError, match="other settings: model was"):
        Runner(replace(base, model="elsewhere"), json_file, tmp_path, None).check_unchanged(trial)
    with pytest.raises(ValueError, match="the DeepSpeed JSON was another"):
        Runner(base, ROOT / "ds_configs" / "zero3.json", tmp_path, None).check_unchanged(trial)


def pretended(monkeypatch, broken: tuple[str, ...] = ()) -> list[str]:
    """Runs that end at once, with losses that follow from method, rate and seed; returns their names as they begin."""
    made = []

    def make_run(self: Runner, trial: Trial, progress) -> str | None:
        made.append(trial.name)
        if trial.name in broken:
            return "the loss is nan"
        self.folder(trial).mkdir(parents=True)
        loss = 1 + trial.seed / 10 + abs(math.log10(trial.learning_rate) + (3 if trial.method == "sorsa" else 2))
        made_here = result(trial.method, trial.learning_rate, trial.seed, self.output, loss, loss)
        made_here.folder.rename(self.folder(trial))
        (self.folder(trial) / "config.yaml").write_text(to_yaml(trial.config(self.base, self.output)))
        (self.folder(trial) / "ds_config.given.json").write_text(self.ds_config.read_text())
        return None

    monkeypatch.setattr(Runner, "make_run", make_run)
    monkeypatch.setattr(figure, "draw_comparison", lambda *_: None)  # it takes longer than all the rest
    return made


ARGUMENTS = ["--methods=sorsa,lora", "--seeds=4,5,6", "--learning_rates=1e-3,1e-2,lora=1e-2,lora=1e-1"]


def test_rates_are_tried_with_the_first_seed_and_the_other_seeds_run_at_the_best(monkeypatch, tmp_path):
    made = pretended(monkeypatch)
    command.compare(parse([*ARGUMENTS, f"--output={tmp_path}"]))
    assert made == [
        "sorsa-lr0.001-seed4", "sorsa-lr0.01-seed4", "lora-lr0.01-seed4", "lora-lr0.1-seed4",
        "sorsa-lr0.001-seed5", "lora-lr0.01-seed5", "sorsa-lr0.001-seed6", "lora-lr0.01-seed6",
    ]  # fmt: skip
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert [(one["method"], one["learning_rate"], one["seeds"]) for one in data["methods"]] == [
        ("sorsa", 1e-3, [4, 5, 6]), ("lora", 1e-2, [4, 5, 6]),
    ]  # fmt: skip
    assert data["methods"][0]["figures"]["eval_loss_end"]["mean"] == pytest.approx(1.5)
    made.clear()
    command.compare(parse([*ARGUMENTS, f"--output={tmp_path}"]))
    assert made == [], "all was finished"


def test_all_seeds_run_at_all_rates_where_that_is_asked_for(monkeypatch, tmp_path):
    made = pretended(monkeypatch)
    command.compare(parse([*ARGUMENTS, f"--output={tmp_path}", "--rate_seeds=all"]))
    tried = ["sorsa-lr0.001", "sorsa-lr0.01", "lora-lr0.01", "lora-lr0.1"]
    assert made == [f"{run}-seed{seed}" for seed in (4, 5, 6) for run in tried]
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert [(one["method"], one["learning_rate"], one["seeds"]) for one in data["methods"]] == [
        ("sorsa", 1e-3, [4, 5, 6]), ("lora", 1e-2, [4, 5, 6]),
    ]  # fmt: skip


def test_drift_is_measured_of_every_rate_and_of_the_base_model_against_itself(monkeypatch, tmp_path):
    pretended(monkeypatch)
    monkeypatch.setattr(figure, "draw_frontier", lambda *_: None)
    called = []

    def launch(self: Runner, script: str, arguments: list[str], name: str, meanwhile) -> str | None:
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        called.append((Path(options["--model"]).name, options.get("--base")))
        folder = Path(options["--output"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"kl": 0.25 * len(called) - 0.25}))
        return None

    monkeypatch.setattr(Runner, "launch", launch)
    command.compare(parse([*ARGUMENTS, f"--output={tmp_path}", "--task=drift", "model=base"]))
    tried = ["sorsa-lr0.001", "sorsa-lr0.01", "lora-lr0.01", "lora-lr0.1"]
    others = [f"{run}-seed{seed}" for seed in (5, 6) for run in ("sorsa-lr0.001", "lora-lr0.01")]
    assert called == [("base", "base"), *((run, None) for run in [*(f"{one}-seed4" for one in tried), *others])]
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert (data["score_before"], data["score"]) == (0, "drift_nats")
    assert [run["score"] for run in data["runs"]] == [0.25 * number for number in range(1, 9)]
    assert data["frontier"]["drift_at_equal_loss"][0]["by_seed"] == {"4": 0.25}


def test_two_comparisons_in_one_folder_do_not_mix(monkeypatch, tmp_path):
    made = pretended(monkeypatch)
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(ValueError, match="is in use"):
        command.compare(parse([*ARGUMENTS, f"--output={tmp_path}"]))
    assert made == []
    lock.release()
    command.compare(parse([*ARGUMENTS, f"--output={tmp_path}"]))
    assert made


def test_a_run_that_fails_is_told_and_tried_again(monkeypatch, tmp_path, capsys):
    broken = ("lora-lr0.1-seed4", "sorsa-lr0.001-seed5")
    pretended(monkeypatch, broken)
    with pytest.raises(ValueError, match=f"failed: {', '.join(broken)}; the same command tries again"):
        command.compare(parse([*ARGUMENTS, f"--output={tmp_path}"]))
    assert f"{broken[0]} failed: the loss is nan" in capsys.readouterr().out
    assert f"- {broken[1]} failed: the loss is nan" in (tmp_path / "comparison.md").read_text()
    made = pretended(monkeypatch)
    command.compare(parse([*ARGUMENTS, f"--output={tmp_path}"]))
    assert made == list(broken)


def test_accuracies_are_asked_of_the_base_model_and_of_every_method_at_its_best_rate(monkeypatch, tmp_path):
    """What launch/evaluate.py is called with, and what is read of what it writes."""
    pretended(monkeypatch)
    called = []

    def launch(self: Runner, script: str, arguments: list[str], name: str, meanwhile) -> str | None:
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        called.append((script, options["--model"], options["--task"], options["--limit"]))
        if "seed6" in name:
            return "out of memory"
        folder = Path(options["--output"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"accuracy": len(called) / 100}))
        return None

    monkeypatch.setattr(Runner, "launch", launch)
    arguments = [*ARGUMENTS, f"--output={tmp_path}", "--task=gsm8k", "--task_options=--limit 20", "model=base"]
    with pytest.raises(ValueError, match="failed: sorsa-lr0.001-seed6, lora-lr0.01-seed6"):
        command.compare(parse(arguments))
    runs = [f"{method}-seed{seed}" for method, seed in (
        ("sorsa-lr0.001", 4), ("lora-lr0.01", 4), ("sorsa-lr0.001", 5), ("lora-lr0.01", 5), ("sorsa-lr0.001", 6),
        ("lora-lr0.01", 6),
    )]  # fmt: skip
    models = ["base", *(str(tmp_path / "runs" / run) for run in runs)]
    assert called == [("evaluate.py", model, "gsm8k", "20") for model in models]
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["score_before"] == pytest.approx(1)
    assert data["methods"][0]["score"]["mean"] == pytest.approx((2 + 4) / 2)
    text = (tmp_path / "comparison.md").read_text()
    assert "gsm8k, %, before | gsm8k, %, after" in text
    assert "sorsa-lr0.001-seed6 failed: it was trained, but not evaluated: out of memory" in text
    called.clear()
    with pytest.raises(ValueError, match="seed6"):
        command.compare(parse(arguments))
    assert [model for _, model, *_ in called] == models, "results are its own only if launch/evaluate.py says so"


def test_perplexity_is_told_as_it_is(monkeypatch, tmp_path):
    """Forgetting: of a text on which nothing was trained, the base model's and each method's."""
    pretended(monkeypatch)

    def launch(self: Runner, script: str, arguments: list[str], name: str, meanwhile) -> str | None:
        assert arguments[-2:] == ["--data", "general.txt"]
        folder = Path(arguments[arguments.index("--output") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"perplexity": 8.5 if "lora" in name else 6.25}))

    monkeypatch.setattr(Runner, "launch", launch)
    wanted = ["--task=loss", "--task_options=--data general.txt"]
    command.compare(parse([*ARGUMENTS, f"--output={tmp_path}", *wanted]))
    text = (tmp_path / "comparison.md").read_text()
    assert "perplexity before | perplexity after" in text
    assert next(line for line in text.splitlines() if line.startswith("| lora")).endswith("| 6.25 | 8.50 |")


def start(project: Path, output: Path) -> subprocess.Popen:
    """The real command: SORSA, and LoRA with a rate at which it breaks down."""
    arguments = [
        "--methods", "sorsa,lora", "--seeds", "1", "--learning_rates", "3e-3,lora=1e9", "--num_gpus", "2",
        "--output", str(output), f"model={project / 'model'}", f"data.path={project / 'data.jsonl'}",
        "data.eval_size=7", "adapter.rank=4", "train.global_batch_size=8", "train.precision=fp32",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "launch/compare.py", *arguments, f"train.steps={STEPS}"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "SORSA_CACHE": str(project / "cache")},
    )  # fmt: skip


def ended(process: subprocess.Popen, code: int) -> str:
    """What it printed."""
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == code, printed[-4000:]
    return printed


@pytest.mark.slow
def test_a_comparison_is_stopped_goes_on_and_survives_a_run_that_fails(project, tmp_path):
    first = tmp_path / "runs" / "sorsa-lr0.003-seed1"
    process = start(project, tmp_path)
    while not ((first / "metrics.jsonl").exists() and '"loss"' in (first / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in ended(process, 75)
    broken = "lora-lr1000000000.0-seed1"
    assert (first / "checkpoints").exists() and not (tmp_path / "runs" / broken).exists()

    printed = ended(start(project, tmp_path), 2)
    assert f"{broken} failed: the norm of the loss's gradient is inf" in printed
    assert f"error: failed: {broken}; the same command tries again" in printed
    assert not (first / "checkpoints").exists()
    [run] = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert run["folder"] == str(first) and run["report"]["peak_memory_gib"] > 0
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert {path.name for path in tmp_path.glob("comparison.*")} == {
        f"comparison.{suffix}" for suffix in ("md", "csv", "json", "png", "svg")
    }
