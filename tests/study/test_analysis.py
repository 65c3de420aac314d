"""The analysis of singular values and vectors: known answers, what training stores, and the command from end to end."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sorsa_ds.config.schema import AdapterConfig, AnalysisConfig, LoadingConfig, RunConfig
from sorsa_ds.model import adapter_file
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.run.checkpoint.saved import SavedTensors
from sorsa_ds.run.snapshots import existing_snapshots, snapshot_path, stored_linears
from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.study.analysis import measures
from sorsa_ds.study.analysis.command import analyze
from sorsa_ds.study.analysis.history import names_of, open_history
from sorsa_ds.study.analysis.measures import Spectrum, turn
from sorsa_ds.study.analysis.options import Options
from tests.helpers.analysed import STEPS, by_hand, handmade, table
from tests.helpers.architectures import save
from tests.helpers.forked import launch_forked
from tests.helpers.projects import ROOT

M, N, K = 9, 7, 7
THETA = 0.3


def factors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (M, K), s, V (N, K) of a matrix with well separated singular values, in float64."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, K, generator=generator, dtype=torch.float64))[0] for n in (M, N))
    return U, torch.arange(K, 0, -1, dtype=torch.float64), V


def spectrum(U, s, V) -> Spectrum:
    return Spectrum.of((U * s) @ V.T)


def rotated(U: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """Two columns turned in their plane by THETA."""
    U = U.clone()
    c, s = math.cos(THETA), math.sin(THETA)
    U[:, i], U[:, j] = c * U[:, i] + s * U[:, j], c * U[:, j] - s * U[:, i]
    return U


def swapped(s: torch.Tensor, i: int, j: int) -> torch.Tensor:
    s = s.clone()
    s[[i, j]] = s[[j, i]]
    return s


def test_scaled_singular_values_are_a_change_of_values_and_no_turn():
    U, s, V = factors()
    start, now = spectrum(U, s, V), spectrum(U, 1.1 * s, V)
    assert measures.delta_sigma(now, start) == pytest.approx(0.1 * s.mean().item(), rel=1e-12)
    found = turn(now, start, 3)
    assert max(found.literal, found.matched, found.subspace) < 1e-14
    assert turn(start, start, 3).swapping == 0


def test_turned_vectors_have_the_angle_that_was_turned():
    U, s, V = factors()
    start, now = spectrum(U, s, V), spectrum(rotated(U, 1, 4), s, V)
    assert measures.delta_sigma(now, start) < 1e-14
    found = turn(now, start, 3)
    lost = 1 - math.cos(THETA)
    assert found.literal == pytest.approx(2 * lost / (2 * K), rel=1e-10)
    assert found.matched == pytest.approx(found.literal, rel=1e-10)
    assert found.subspace == pytest.approx(lost / (2 * 3), rel=1e-10)  # of vectors 0, 1, 2 one has left by THETA
    assert turn(now, start, 5).subspace < 1e-14  # both are inside
    assert found.swapping < 1e-9


def test_signs_mean_nothing():
    U, s, V = factors()
    signs = torch.tensor([1, -1, 1, -1, -1, 1, -1], dtype=torch.float64)
    start = Spectrum(U, s, V)
    assert turn(Spectrum(U * signs, s, V * -signs), start, 2).literal < 1e-14


def test_swapped_order_is_all_of_delta_d_and_nothing_of_the_matched_one():
    U, s, V = factors()
    start, now = spectrum(U, s, V), spectrum(U, swapped(s, 2, 3), V)
    found = turn(now, start, 4)
    assert found.literal == pytest.approx(4 / (2 * K), rel=1e-10)
    assert found.matched < 1e-14 and found.subspace < 1e-14
    assert found.swapping == pytest.approx(1)
    assert turn(now, start, 3).subspace == pytest.approx(1 / 3, rel=1e-10)  # the third triplet is another one


def test_swapping_is_told_from_turning_where_both_happen():
    U, s, V = factors()
    now = spectrum(rotated(U, 0, 5), swapped(s, 2, 3), V)
    found = turn(now, spectrum(U, s, V), 4)
    turned, order = (1 - math.cos(THETA)) / K, 4 / (2 * K)
    assert found.matched == pytest.approx(turned, rel=1e-10)
    assert found.swapping == pytest.approx(order / (order + turned), rel=1e-10)


def test_the_matching_is_the_best_of_all():
    torch.manual_seed(1)
    start, now = (Spectrum.of(torch.randn(6, 5, dtype=torch.float64)) for _ in range(2))
    likeness = ((now.U.T @ start.U).abs() + (now.V.T @ start.V).abs()).numpy()
    best = max(sum(likeness[i, p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
    assert turn(now, start, 2).matched == pytest.approx(1 - best / 10, rel=1e-12)


def test_condition_numbers_leave_out_what_is_zero():
    assert measures.condition(torch.tensor([8.0, 2.0, 1e-9, 0.0])) == 4
    assert measures.condition(torch.zeros(3)) == math.inf
    U, s, V = factors()
    assert measures.condition(spectrum(U, s, V).s) == pytest.approx(7, rel=1e-12)


def test_orthonormality_and_ranks_have_known_values():
    U, s, _ = factors()
    assert measures.orthonormality(U) < 1e-14
    assert measures.orthonormality(1.5 * U) == pytest.approx(1.25 * math.sqrt(K), rel=1e-12)
    assert measures.effective_rank(torch.full((5,), 3.0, dtype=torch.float64)) == pytest.approx(5, rel=1e-12)
    assert measures.effective_rank(torch.tensor([2.0, 0.0, 0.0])) == 1
    assert measures.stable_rank(s) == pytest.approx(sum(i * i for i in range(1, 8)) / 49, rel=1e-12)
    assert measures.effective_rank(torch.zeros(3)) == measures.stable_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize(
    ("architecture", "method"), [("llama", "sorsa"), ("llama", "lora"), ("llama", "full"), ("gpt2", "full")]
)
def test_a_snapshot_becomes_the_merged_weight_of_its_step(tmp_path, architecture, method):
    run, weights = handmade(tmp_path, architecture, method)
    history = open_history(run)
    assert history.steps == [*STEPS]
    assert {target.name for target in history.linears} == {name for name, _ in weights}
    for target in history.linears:
        for step in history.steps:
            torch.testing.assert_close(
                history.weight(target, step).double(), weights[target.name, step], rtol=0, atol=3e-6
            )


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """(folder, its two runs, the weights of the first, the output)."""
    folder = tmp_path_factory.mktemp("analysed")
    layers = AnalysisConfig(layers=["q_proj", "layers.1.mlp.down_proj"])
    first, weights = handmade(folder, "llama", "sorsa", analysis=layers)
    second, _ = handmade(folder, "llama", "lora", analysis=layers)
    report = analyze(Options([first, second], folder / "out", workers=2))
    return folder, (first, second), weights, report


@pytest.mark.slow
def test_the_table_is_what_numpy_computes_from_the_merged_weights(analysed):
    folder, _, weights, _ = analysed
    rows = table(folder / "out" / "measures.csv")
    assert len(rows) == 2 * 3 * len(STEPS)
    ours = [row for row in rows if row["run"] == "llama-sorsa"]
    assert {row["linear"].rpartition(".")[2] for row in ours} == {"q_proj", "down_proj"}
    trained = {step: load_file(path) for step, path in existing_snapshots(folder / "llama-sorsa").items()}
    for row in ours:
        step = int(row["step"])
        wanted = by_hand(weights[row["linear"], step].numpy(), weights[row["linear"], 0].numpy())
        for key, value in wanted.items():  # merged weights are fp32
            assert float(row[key]) == pytest.approx(value, rel=2e-3, abs=1e-6), (row["linear"], step, key)
        assert int(row["block"]) == int(row["linear"].split(".")[2])
        if step in trained:
            for side in "UV":
                factor = trained[step][f"{row['linear']}.{side}"].double().numpy()
                gram = np.linalg.norm(factor.T @ factor - np.eye(4))
                assert float(row[f"orthonormality_{side.lower()}"]) == pytest.approx(gram, rel=1e-9)
                assert float(row[f"condition_{side.lower()}"]) == pytest.approx(np.linalg.cond(factor), rel=1e-9)
        if step == 0:
            assert float(row["delta_sigma"]) == 0 and float(row["delta_d"]) < 1e-12
    assert all(row["condition_u"] == "" for row in rows if row["run"] == "llama-lora")


@pytest.mark.slow
def test_the_report_holds_everything_and_asks_for_nothing(analysed):
    folder, _, _, report = analysed
    text = report.read_text()
    assert report.name == "report.html"
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)
    assert text.count("llama-lora") > len(STEPS)
    for name in ("figure2", "swapping", "figure3", "figure5", "condition"):
        assert (folder / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / "out" / f"{name}.svg").read_text()


@pytest.mark.slow
def test_an_analysis_goes_on_where_it_was_interrupted(analysed):
    folder, runs, _, _ = analysed
    path = folder / "out" / "measures.csv"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    marked = lines[3].split(",")
    marked[4] = "123.5"  # not computed anew
    path.write_text("".join([*lines[:3], ",".join(marked), *lines[4:8], lines[8][:40]]))
    try:
        analyze(Options(runs, folder / "out", workers=1))
        again = path.read_text().splitlines(keepends=True)
        assert again[3] == ",".join(marked)
        assert again[:3] + again[4:] == lines[:3] + lines[4:]
    finally:
        path.write_text(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, "made with --rank 4, and this is 2"),
        ({"dtype": "float32"}, "made with --dtype float64"),
        ({"dtype": "bfloat16"}, "there is no 'bfloat16'; there are float64, float32"),
        ({"workers": 0}, "--workers: 0"),
        ({"run": [Path("nowhere")]}, "there is no folder .*nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(analysed, change, message):
    folder, runs, _, _ = analysed
    with pytest.raises(ValueError, match=message):
        analyze(Options(**{"run": runs, "output": folder / "out", **change}))


@pytest.mark.slow
def test_a_folder_that_another_process_works_in_is_refused(analysed):
    folder, runs, _, _ = analysed
    lock = RunLock(folder / "out")
    lock.acquire()
    try:
        with pytest.raises(ValueError, match="out is in use"):
            analyze(Options(runs, folder / "out"))
    finally:
        lock.release()


@pytest.mark.slow
def test_another_run_of_the_same_name_and_an_unfinished_one_are_refused(analysed, tmp_path):
    folder, _, _, _ = analysed
    other, _ = handmade(tmp_path, "llama", "lora")
    (other / "adapter" / adapter_file.TRAINED).write_bytes((other / "adapter" / adapter_file.INITIAL).read_bytes())
    adapter_file.record_digests(other / "adapter")
    with pytest.raises(ValueError, match="holds another run named llama-lora"):
        analyze(Options([other], folder / "out"))
    (other / "report.json").unlink()
    with pytest.raises(ValueError, match="is unfinished"):
        analyze(Options([other], tmp_path / "out"))


def test_a_damaged_snapshot_is_named_before_anything_is_computed(tmp_path):
    run, _ = handmade(tmp_path, "llama", "lora", analysis=AnalysisConfig(layers=["layers.0.self_attn.q_proj"]))
    snapshot_path(run, 4).write_bytes(snapshot_path(run, 4).read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"step-000004\.safetensors: missing, truncated"):
        analyze(Options([run], tmp_path / "out", workers=1))
    assert not (tmp_path / "out").exists()


def test_runs_are_named_apart():
    assert names_of([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert names_of([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert names_of([Path("/c/a/x"), Path("/d/a/x")]) == ["/c/a/x", "/d/a/x"]
    with pytest.raises(ValueError, match="named twice"):
        names_of([Path("/a/x"), Path("/a/../a/x")])


def test_unknown_linears_are_refused_with_the_nearest_name(tmp_path):
    model = skeleton(save("llama", tmp_path / "base"), LoadingConfig())
    config = {"adapter": AdapterConfig(rank=4, targets=["q_proj", "v_proj"])}
    chosen = stored_linears(model, RunConfig(**config, analysis=AnalysisConfig(layers="*.1.*.v_proj")))
    assert [target.name for target in chosen] == ["model.layers.1.self_attn.v_proj"]
    with pytest.raises(ValueError, match=r"analysis.layers: 'q_prj' matches no linear.*Did you mean 'q_proj'"):
        stored_linears(model, RunConfig(**config, analysis=AnalysisConfig(layers=["q_prj"])))
    with pytest.raises(ValueError, match="'k_proj' matches no linear"):  # not adapted
        stored_linears(model, RunConfig(**config, analysis=AnalysisConfig(layers=["k_proj"])))
    with pytest.raises(ValueError, match="the list is empty"):
        stored_linears(model, RunConfig(**config, analysis=AnalysisConfig(layers=[])))


@pytest.mark.slow
def test_training_stores_its_masters_and_a_resumed_run_goes_on_with_them(project):
    """On two ranks under ZeRO-3, against the checkpoints of the same steps."""
    settings = ["analysis.every=2", "analysis.layers=[q_proj,down_proj]", "output.save_every=2"]
    _, run, _ = launch_forked(project, "stored", *settings, "output.keep_checkpoints=3")
    assert [*existing_snapshots(run)] == [2, 4]
    before = {step: load_file(path) for step, path in existing_snapshots(run).items()}
    names = {f"model.layers.{i}.{part}.{leaf}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
             for leaf in "UsV"}  # fmt: skip
    for step, tensors in before.items():
        assert set(tensors) == names
        folder = run / "checkpoints" / f"step-{step:06d}"
        saved = SavedTensors(sorted(folder.glob("rank-*.safetensors")))
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, saved.values(name, tensor.shape)), (step, name)
    assert not torch.equal(before[2][min(names)], before[4][min(names)])

    snapshot_path(run, 2).unlink()
    save_file({"stale": torch.zeros(1)}, snapshot_path(run, 4))
    save_file({"stale": torch.zeros(1)}, snapshot_path(run, 5))
    launch_forked(project, "stored", *settings, "--resume", str(run / "checkpoints" / "step-000002"))
    assert [*existing_snapshots(run)] == [2, 4]
    for step, path in existing_snapshots(run).items():
        again = load_file(path)
        assert set(again) == names
        assert all(torch.equal(again[name], before[step][name]) for name in names)

    command = [sys.executable, "launch/analyze.py", "--run", str(run), "--output", str(project / "analysis")]
    done = subprocess.run([*command, "--workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(table(project / "analysis" / "measures.csv")) == 4 * 4
