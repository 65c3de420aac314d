"""Which runs the analysis bears: resumed with other settings, damaged, oddly named, or added to a folder later."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from sorsa_ds.config.command_line import load_settings
from sorsa_ds.config.schema import AnalysisConfig, LoadingConfig, RegularizerConfig, RunConfig
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.run.recorder import SnapshotRecorder
from sorsa_ds.run.snapshots import check_continues, existing_snapshots, snapshot_path
from sorsa_ds.runtime import plotting
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.study.analysis import figures
from sorsa_ds.study.analysis import table as tables
from sorsa_ds.study.analysis.command import analyze
from sorsa_ds.study.analysis.history import open_history
from sorsa_ds.study.analysis.options import Options
from sorsa_ds.study.analysis.request import _rank, open_request
from sorsa_ds.study.analysis.runs import Run
from sorsa_ds.study.analysis.table import Figures, Key, Row, Table
from sorsa_ds.train.trainer import Trainer
from tests.helpers.analysed import handmade, table
from tests.helpers.forked import launch_forked
from tests.helpers.projects import ROOT

Q0 = "model.layers.0.self_attn.q_proj"
ONE = AnalysisConfig(every=2, layers=["layers.0.self_attn.q_proj"])


def kept_of(run: Path, step: int, *kinds: str) -> None:
    """Leave of a snapshot what belongs to linears of some kinds."""
    tensors = load_file(snapshot_path(run, step))
    save_file(
        {name: x for name, x in tensors.items() if any(f".{kind}." in name for kind in kinds)}, snapshot_path(run, step)
    )


def edit(path: Path, **entries) -> None:
    """Change entries of a JSON file; `...` removes one."""
    found = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


@pytest.mark.parametrize("method", ["sorsa", "lora", "full"])
def test_what_every_snapshot_holds_is_analysed_whatever_the_settings_say_at_the_end(tmp_path, method):
    run, _ = handmade(tmp_path, "llama", method)  # they say `all`, as after a resume without analysis.layers
    kept_of(run, 2, "q_proj", "down_proj")
    kept_of(run, 4, "q_proj", "v_proj")
    assert [target.name for target in open_history(run).linears] == [Q0, Q0.replace("0", "1")]
    kept_of(run, 4, "v_proj")
    with pytest.raises(ValueError, match=r"analysis: the snapshots have no linear of this run in common"):
        open_history(run)


def test_without_snapshots_the_settings_name_the_linears(tmp_path):
    run, _ = handmade(tmp_path, "llama", "sorsa", analysis=ONE)
    for path in existing_snapshots(run).values():
        path.unlink()
    history = open_history(run)
    assert [target.name for target in history.linears] == [Q0]
    assert history.steps == [0, 6]


def test_a_run_that_goes_on_stores_the_same_linears(tmp_path):
    run, _ = handmade(tmp_path, "llama", "sorsa", analysis=ONE)
    config = load_settings(RunConfig, run / "config.yaml")
    model = skeleton(Path(config.model), LoadingConfig())
    check_continues(model, config, run, 4)

    def with_layers(*layers: str) -> RunConfig:
        return replace(config, analysis=AnalysisConfig(every=2, layers=[*layers]))

    check_continues(model, with_layers("*.0.*.q_proj"), run, 4)  # the same, in other words
    check_continues(model, with_layers("q_proj"), run, 1)  # what is there is removed
    with pytest.raises(ValueError, match=r"analysis.layers: model.layers.1.self_attn.q_proj is not stored in .*000004"):
        check_continues(model, with_layers("q_proj"), run, 4)
    with pytest.raises(ValueError, match=rf"{Q0} is stored in .*, and would not be from here on"):
        check_continues(model, with_layers("layers.1.self_attn.q_proj"), run, 2)


@pytest.mark.slow
def test_a_resumed_run_tells_the_regulariser_of_its_beginning_and_is_analysed(project):
    """Begun on two ranks, with the coefficient over two accumulated micro-batches; resumed on one, which makes four."""
    settings = ["regularizer.preset=reference", "train.micro_batch_size=2", "output.save_every=2",
                "output.keep_checkpoints=3"]  # fmt: skip
    _, run, _ = launch_forked(project, "other-layers", *settings, "analysis.every=2", "analysis.layers=[q_proj]")
    begun = json.loads((run / "report.json").read_text())["regularizer"]
    assert begun == asdict(Regularizer("norm", "mean", 4e-4 / 1e-3 / 2, 0))
    resume = ["--resume", str(run / "checkpoints" / "step-000004")]
    printed, _, _ = launch_forked(
        project, "other-layers", *settings, *resume, "analysis.every=1", "analysis.layers=[v_proj]", ranks=1, code=2
    )
    assert "analysis.layers: model.layers.0.self_attn.q_proj is stored in" in printed
    launch_forked(project, "other-layers", *settings, *resume, ranks=1)
    assert load_settings(RunConfig, run / "config.yaml").train.gradient_accumulation_steps == 4
    opened_again = Run.of("other-layers", run)
    assert asdict(opened_again.reg) == begun
    assert [target.name.rpartition(".")[2] for target in opened_again.history.linears] == ["q_proj"] * 2
    assert opened_again.history.steps == [0, 2, 4, 6]
    analyze(Options([run], project / "again-out", workers=1))
    assert len(table(project / "again-out" / "measures.csv")) == 2 * 4


def test_the_regulariser_is_the_reports_and_the_settings_where_that_is_silent(tmp_path):
    run, _ = handmade(tmp_path, "llama", "sorsa", analysis=ONE, regularizer=RegularizerConfig(gamma=5e-4))
    assert Run.of("x", run).reg == Regularizer("norm", "mean", 0.5)
    used = Regularizer("squared", "sum", 0.25, 3)
    edit(run / "report.json", regularizer=asdict(used))
    found = Run.of("x", run)
    assert found.reg == used
    assert found.label == r"x ($\gamma / \eta_d$ = 0.25, squared, sum, orthonormal every 3)"
    edit(run / "report.json", regularizer={"form": "norm", "strength": 2})
    with pytest.raises(ValueError, match=r"report\.json is damaged: its regularizer"):
        Run.of("x", run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.jsonl").write_text(""), r"metrics\.jsonl: missing, or without the line of an opt"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl: missing"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"st\n'), "jsonl, line 2: not"),
        (lambda run: (run / "metrics.jsonl").write_text('{"loss": 2}\n'), r"metrics\.jsonl, line 1: has no step"),
        (lambda run: edit(run / "report.json", loss_last=...), r"report\.json is damaged: it has no loss_last"),
        (lambda run: edit(run / "report.json", steps="six"), r"report\.json is damaged: steps is 'six'"),
        (lambda run: (run / "report.json").write_text("[]"), r"report\.json is damaged: it holds no object"),
    ],
)  # fmt: skip
def test_a_damaged_log_or_report_is_named_before_anything_is_computed(tmp_path, damage, message):
    run, _ = handmade(tmp_path, "llama", "lora", analysis=ONE)
    damage(run)
    with pytest.raises(ValueError, match=message):
        open_request(Options([run], tmp_path / "out"))


@pytest.mark.slow
def test_a_weight_that_is_no_number_is_named_and_the_rows_before_it_stay(tmp_path):
    run, _ = handmade(tmp_path, "llama", "lora", analysis=ONE)
    tensors = load_file(snapshot_path(run, 4))
    tensors[f"{Q0}.lora_B.default.weight"][0, 0] = math.nan
    save_file(tensors, snapshot_path(run, 4))
    command = [sys.executable, "launch/analyze.py", "--run", str(run), "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--workers", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"step-000004.safetensors: {Q0}.lora_B.default.weight holds NaN or Inf" in done.stderr
    assert "leaked" not in done.stderr
    assert [row["step"] for row in table(tmp_path / "out" / "measures.csv")] == ["0", "2"]


@pytest.mark.slow
def test_a_run_keeps_its_name_when_a_folder_gets_further_ones(tmp_path):
    first, _ = handmade(tmp_path / "a", "llama", "lora", analysis=ONE)
    second, _ = handmade(tmp_path / "b", "llama", "sorsa", analysis=ONE)
    second = second.rename(second.parent / first.name)
    out = tmp_path / "out"
    analyze(Options([first], out, workers=1))
    analyze(Options([first, second], out, workers=1))
    assert {row["run"] for row in table(out / "measures.csv")} == {"llama-lora", "b/llama-lora"}
    assert len(table(out / "measures.csv")) == 2 * 4
    analyze(Options([second], out, workers=1))
    assert len(table(out / "measures.csv")) == 2 * 4
    assert {*json.loads((out / "analysis.json").read_text())["runs"]} == {"llama-lora", "b/llama-lora"}


def test_the_rank_is_the_largest_of_any_adapted_linear(tmp_path):
    run, _ = handmade(tmp_path, "llama", "lora", analysis=ONE)
    request = open_request(Options([run], tmp_path / "out"))
    assert request.rank == 4
    targets = request.runs[0].history.source.targets
    object.__setattr__(targets[3], "rank", 11)  # as adapter.rank_pattern would
    assert _rank(request.runs) == 11


def test_an_output_in_a_runs_folder_is_refused(tmp_path):
    run, _ = handmade(tmp_path, "llama", "lora", analysis=ONE)
    for output in (run, run / "deeper" / "out"):
        with pytest.raises(ValueError, match="is in the folder of a run"):
            open_request(Options([run], output))


def test_a_full_disk_names_the_table(tmp_path, monkeypatch):
    written = Table(tmp_path / "measures.csv")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(ValueError, match=r"measures\.csv: cannot be written \(No space left"):
        written.append(Row(Key("run", 0, Q0, 0), Figures(*[0.0] * len(Figures.__dataclass_fields__))))


def test_a_snapshot_that_cannot_be_removed_is_told(tmp_path):
    path = snapshot_path(tmp_path, 4)
    path.mkdir(parents=True)  # unlink cannot remove a folder

    class Engine:
        trained_shapes, device = {}, torch.device("cpu")

    with pytest.raises(ValueError, match=r"step-000004\.safetensors: of a later step, and cannot be removed"):
        SnapshotRecorder(tmp_path, Engine(), [], 2)


@pytest.fixture
def shown(monkeypatch):
    """The texts of every legend that is drawn."""
    texts = []
    drawn = plotting.legend

    def legend(figure, handles, **settings):
        drawn(figure, handles, **settings)
        texts.append([text.get_text() for text in figure.legends[0].get_texts()])

    monkeypatch.setattr(figures, "legend", legend)
    return texts


@pytest.mark.slow
def test_runs_of_any_name_are_in_every_legend(tmp_path, shown):
    first, _ = handmade(tmp_path, "llama", "lora", analysis=ONE)
    second, _ = handmade(tmp_path, "llama", "sorsa", analysis=ONE)
    first = first.rename(tmp_path / "_hidden")
    second = second.rename(tmp_path / r"$\frac{$_50$")
    out = tmp_path / "out"
    analyze(Options([first, second], out, workers=1))
    both = ["_hidden (lora)", r"\$\frac{\$_50\$ ($\gamma / \eta_d$ = 0.2, norm, mean)"]
    assert shown[1:] == [both, both[1:], both]  # after the parts of ΔD; figure 5 is of SORSA alone
    assert r">$\frac{$_50$<" in (out / "figure2.svg").read_text()  # above its panel


@pytest.mark.slow
def test_a_kind_that_the_first_panel_lacks_has_its_marker_in_the_legend(tmp_path, monkeypatch):
    first, _ = handmade(tmp_path, "llama", "lora", analysis=ONE)
    second, _ = handmade(tmp_path, "llama", "sorsa", analysis=AnalysisConfig(layers=["layers.0.mlp.up_proj"]))
    drawn = {}
    monkeypatch.setattr(figures, "legend", lambda figure, handles: drawn.setdefault(len(drawn), handles))
    analyze(Options([first, second], tmp_path / "out", workers=1))
    assert {kind: len(dots.get_offsets()) for kind, dots in drawn[0].items()} == {"q_proj": 3, "up_proj": 3}


def test_a_checkpoint_waits_for_the_snapshots_before_it():
    done = []
    trainer = SimpleNamespace(
        keeper=SimpleNamespace(is_due=False, step_ends=lambda: done.append("saved")),
        recorder=SimpleNamespace(finish=lambda: done.append("written")),
        lock=SimpleNamespace(check=lambda: None),
        device=torch.device("cpu"),
    )
    trainer.before_saving = lambda: Trainer.before_saving(trainer)
    Trainer.see_to_checkpoints(trainer)
    assert done == ["saved"]
    trainer.keeper.is_due = True
    Trainer.see_to_checkpoints(trainer)
    assert done == ["saved", "written", "saved"]


def test_numbers_on_a_narrow_axis_lie_apart():
    for values in ([1e-4, 2e-4], [1e-7, 3.3e-2], [2e-4, 4.5e-3]):
        figure = Figure(figsize=(3.3, 2.2), layout="constrained")
        ax = figure.subplots()
        ax.scatter(values, values)
        plotting.scaled(ax.xaxis, values)
        plotting.apart(ax.xaxis)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        labels = [*ax.get_xticklabels(), *ax.get_xticklabels(minor=True)]
        boxes = sorted(
            (label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()),
            key=lambda box: box.x0,
        )
        inside = [box for box in boxes if ax.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= ax.bbox.x1 + 1]
        assert len(inside) >= 2
        assert all(left.x1 < right.x0 for left, right in pairwise(inside)), values


def test_rounding_sets_no_axis():
    ax = Figure().subplots()
    plotting.scaled(ax.yaxis, [1e-16, 3e-15, 0.5, 1.0])
    assert ax.get_yscale() == "linear"
    plotting.scaled(ax.yaxis, [1e-16, 0.01, 1.0])
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] > 1e-3
