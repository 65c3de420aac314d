"""Turn told from mixing of nearly equal singular values, and what an analysis is measured and shown from."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import numpy as np
import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.linalg import subspace_angles
from transformers import AutoModelForCausalLM

from sorsa_ds.config import command_line
from sorsa_ds.config.schema import AnalysisConfig, LoadingConfig, ResidualConfig, RunConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.model import adapter_file
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.run import recorder
from sorsa_ds.run.recorder import SnapshotRecorder
from sorsa_ds.run.snapshots import snapshot_path, stored_linears
from sorsa_ds.study.analysis import compute, figures
from sorsa_ds.study.analysis.command import analyze
from sorsa_ds.study.analysis.compute import Job, measure_linear, workers_for
from sorsa_ds.study.analysis.history import open_history
from sorsa_ds.study.analysis.measures import NEARLY, Spectrum, tolerance, turn
from sorsa_ds.study.analysis.options import Options
from sorsa_ds.study.analysis.table import Figures
from tests.helpers.analysed import by_hand, handmade
from tests.helpers.architectures import save
from tests.helpers.projects import ROOT

THETA = 0.4
SHAPES = [(12, 12), (15, 12), (12, 15)]
VALUES = torch.tensor([9, 7, 7, 7, 5, 3, 3, 2, 1, 1, 1, 0.5], dtype=torch.float64)
ONE, SEVENS, THREES = [0], [1, 2, 3], [5, 6]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(M: int, N: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal U (M, K) and V (N, K)."""
    k = min(M, N)
    return tuple(torch.linalg.qr(random(n, k, seed=seed + n))[0] for n in (M, N))


def mixed(vectors: torch.Tensor, columns: list[int], seed: int) -> torch.Tensor:
    """The columns in another orthonormal basis of what they span."""
    Q, _ = torch.linalg.qr(random(len(columns), len(columns), seed=seed))
    vectors = vectors.clone()
    vectors[:, columns] = vectors[:, columns] @ Q
    return vectors


def rotated(vectors: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """Two columns turned in their plane by THETA."""
    c, s = math.cos(THETA), math.sin(THETA)
    vectors = vectors.clone()
    vectors[:, [i, j]] = vectors[:, [i, j]] @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return vectors


def changed(W: torch.Tensor, relative: float, seed: int) -> torch.Tensor:
    """W and a random matrix of so much of its norm."""
    noise = random(*W.shape, seed=seed)
    return W + relative * noise * (W.norm() / noise.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_another_basis_of_equal_singular_values_is_mixing_and_no_turn(shape):
    U, V = bases(*shape)
    now = Spectrum(mixed(mixed(U, SEVENS, 1), THREES, 2), VALUES, mixed(mixed(V, SEVENS, 3), THREES, 4))
    found = turn(now, Spectrum(U, VALUES, V), 4)
    assert found.literal >= found.matched > 0.1
    assert found.clustered < 1e-14
    assert found.swapping == pytest.approx(1)


def test_values_that_are_nearly_equal_at_one_of_both_ends_are_enough():
    U, V = bases(12, 12)
    apart = VALUES.clone()
    apart[SEVENS] = torch.tensor([7.2, 7.0, 6.8], dtype=torch.float64)
    start, now = Spectrum(U, apart, V), Spectrum(mixed(U, SEVENS, 1), VALUES, mixed(V, SEVENS, 2))
    assert tolerance(now, start) < 0.1
    assert turn(now, start, 4).clustered < 1e-14 and turn(start, now, 4).clustered < 1e-14
    assert turn(replace(now, s=apart), start, 4).clustered > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turn_between_clusters_has_its_angle_whatever_is_mixed_inside(shape):
    U, V = bases(*shape)
    turned = mixed(rotated(U, ONE[0], SEVENS[1]), SEVENS, 1)  # the plane of sigma 9 and a 7
    found = turn(Spectrum(turned, VALUES, mixed(V, SEVENS, 2)), Spectrum(U, VALUES, V), 4)
    assert found.clustered == pytest.approx(2 * (1 - math.cos(THETA)) / (2 * 12), rel=1e-10)
    assert found.literal >= found.matched > found.clustered
    assert found.swapping == pytest.approx(1 - found.clustered / found.literal)
    inside = turn(Spectrum(rotated(U, 1, 3), VALUES, rotated(V, 1, 3)), Spectrum(U, VALUES, V), 4)
    assert inside.clustered < 1e-14 and inside.matched > 0.01


def test_a_swapped_pair_far_apart_and_scaled_values_are_no_turn_of_clusters():
    U, V = bases(12, 12)
    order = [4, *range(1, 4), 0, *range(5, 12)]
    start = Spectrum(U, VALUES, V)
    found = turn(Spectrum(U[:, order], VALUES, V[:, order]), start, 4)
    assert found.literal == pytest.approx(4 / 24) and found.clustered < 1e-14 and found.swapping == pytest.approx(1)
    both = turn(Spectrum(mixed(U, SEVENS, 1)[:, order], VALUES, mixed(V, SEVENS, 2)[:, order]), start, 4)
    assert both.literal > both.matched > 0.01 and both.clustered < 1e-14
    assert turn(Spectrum(U, 1.3 * VALUES, V), start, 4).clustered < 1e-14
    assert turn(start, start, 4).clustered < 1e-14
    one = Spectrum.of(torch.full((5, 1), 2.0, dtype=torch.float64))
    assert turn(one, one, 1).clustered < 1e-14


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96)])
@pytest.mark.parametrize("relative", [3e-6, 1e-3])
def test_a_tail_that_the_matrix_does_not_tell_apart_has_not_turned(shape, relative):
    """8 singular values of 1 and more and 56 of 1e-8: nothing that matters turns, one to one most of it does."""
    U, V = bases(*shape)
    s = torch.cat([torch.arange(8, 0, -1), torch.full((56,), 1e-8)]).double()
    W = (U * s) @ V.T
    found = turn(Spectrum.of(changed(W, relative, 5)), Spectrum.of(W), 8)
    assert found.literal > 0.7 and found.matched > 0.5
    assert found.clustered < relative**2
    assert found.swapping > 0.9999


def test_clusters_are_what_scipys_principal_angles_say():
    """Three clusters of widths under the change, by numpy and scipy from the matrices alone."""
    U, V = bases(20, 14)
    groups = [range(3), range(3, 8), range(8, 14)]
    s = torch.cat([10 - torch.arange(3) / 1e3, 6 - torch.arange(5) / 1e3, 2 - torch.arange(6) / 1e3]).double()
    W = (U * s) @ V.T
    W_t = changed(W, 0.02, 6)
    assert np.linalg.norm((W_t - W).numpy(), 2) > 0.01
    (U_t, _, V_t), (U_0, _, V_0) = (np.linalg.svd(x.numpy(), full_matrices=False) for x in (W_t, W))
    kept = sum(
        np.cos(subspace_angles(t[:, [*group]], o[:, [*group]])).sum()
        for group in groups
        for t, o in ((U_t, U_0), (V_t.T, V_0.T))
    )
    found = turn(Spectrum.of(W_t), Spectrum.of(W), 3)
    assert found.clustered == pytest.approx(1 - kept / 28, rel=1e-9)
    assert 1e-5 < found.clustered < found.matched / 10


def test_nearly_equal_is_the_size_of_the_change_but_no_more_than_a_hundredth():
    W = random(30, 20, seed=7)
    start = Spectrum.of(W)
    sigma_1 = start.s[0].item()
    for relative in (1e-6, 1e-4):
        W_t = changed(W, relative, 8)
        assert tolerance(Spectrum.of(W_t), start) == pytest.approx(np.linalg.norm((W_t - W).numpy(), 2), rel=0.1)
    far = Spectrum.of(changed(W, 0.5, 8))
    assert tolerance(far, start) == pytest.approx(NEARLY * max(sigma_1, far.s[0].item()))
    assert tolerance(start, start) == 20 * torch.finfo(torch.float64).eps * sigma_1  # the rounding of the values
    torch.manual_seed(11)
    state = torch.get_rng_state()
    assert tolerance(far, start) == tolerance(far, start)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_large_change_turns_and_is_not_all_one_cluster():
    W = random(60, 60, seed=9)
    found = turn(Spectrum.of(changed(W, 1.0, 10)), Spectrum.of(W), 8)
    assert found.clustered > 0.4


def test_a_chain_of_close_values_is_cut():
    """Each a little closer to the next than the change, the ends far apart: a turn between the ends counts."""
    U, V = bases(40, 40)
    s = torch.linspace(10, 8, 40, dtype=torch.float64)  # steps of 0.051, nearly equal is up to 0.1
    start, now = Spectrum(U, s, V), Spectrum(rotated(U, 0, 39), s, rotated(V, 0, 39))
    assert tolerance(now, start) > 0.051
    assert turn(now, start, 4).clustered == pytest.approx(4 * (1 - math.cos(THETA)) / 80, rel=1e-10)


def kept_as(run: Path, precision: str, storage: str) -> None:
    """Let a handmade run have been one of that precision and residual."""
    config = command_line.load_settings(RunConfig, run / "config.yaml")
    config = replace(config, train=replace(config.train, precision=precision), residual=ResidualConfig(storage=storage))
    model = skeleton(Path(config.model), LoadingConfig())
    adapter_file.describe_adapter(
        run / "adapter", config, [] if config.method == "full" else select_targets(model, config.adapter), digests={}
    )
    adapter_file.record_digests(run / "adapter")
    (run / "config.yaml").write_text(to_yaml(config))


def as_kept(W: torch.Tensor, storage: str) -> torch.Tensor:
    """W through its storage and back, by torch and bitsandbytes alone."""
    if storage == "bf16":
        return W.bfloat16().double()
    codes, state = bnb.quantize_4bit(W.float().contiguous(), blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state).double().view(W.shape)


@pytest.mark.parametrize(
    ("method", "precision", "storage"),
    [("sorsa", "mixed", "bf16"), ("sorsa", "fp32", "nf4"), ("lora", "mixed", "bf16"), ("full", "bf16", "bf16")],
)
def test_the_start_is_the_weight_as_training_kept_it(tmp_path, method, precision, storage):
    name = "model.layers.0.self_attn.q_proj"
    run, _ = handmade(tmp_path, "llama", method, analysis=AnalysisConfig(layers=[name]))
    kept_as(run, precision, storage)
    raw = AutoModelForCausalLM.from_pretrained(tmp_path / "base-llama", dtype=torch.float32)
    W = raw.get_submodule(name).weight.detach().double()
    trained = {2: load_file(snapshot_path(run, 2))}
    if method == "sorsa":
        trained[0] = load_file(run / "adapter" / adapter_file.INITIAL)
        used = {step: [tensors[f"{name}.{leaf}"] for leaf in "UsV"] for step, tensors in trained.items()}
        sides = {step: (U * s, V) for step, (U, s, V) in used.items()}
        if precision != "fp32":
            sides = {step: (left.bfloat16(), right.bfloat16()) for step, (left, right) in sides.items()}
        products = {step: left.double() @ right.double().T for step, (left, right) in sides.items()}
        rest = as_kept(W - products[0], storage)
        wanted = {step: rest + product for step, product in products.items()}
    elif method == "lora":
        B, A = (trained[2][f"{name}.lora_{leaf}.default.weight"].double() for leaf in "BA")
        wanted = {0: as_kept(W, storage), 2: as_kept(W, storage) + B @ A}
    else:
        wanted = {0: as_kept(W, storage), 2: trained[2][f"{name}.weight"].bfloat16().double()}

    history = open_history(run)
    [target] = history.linears
    lost = torch.linalg.norm(wanted[0] - W)
    assert lost > 1e-4 * torch.linalg.norm(W)
    for step in (0, 2):
        assert torch.linalg.norm(history.weight(target, step).double() - wanted[step]) < 0.02 * lost
    [(_, found)] = measure_linear(history, target, [2], torch.float64, 4)
    right, wrong = (by_hand(wanted[2].numpy(), start.numpy())["delta_sigma"] for start in (wanted[0], W))
    assert abs(found.delta_sigma - right) < 0.05 * abs(wrong - right)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """An analysis of two runs: its folder, runs, rows, report, and the axes of its pictures."""
    folder = tmp_path_factory.mktemp("shown")
    layers = AnalysisConfig(layers=["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"])
    runs = [handmade(folder, "llama", method, analysis=layers)[0] for method in ("sorsa", "lora")]
    axes, picture = {}, figures.picture

    @contextmanager
    def keeping(path, *args, **settings):
        with picture(path, *args, **settings) as (figure, of_figure):
            axes[path.name] = list(of_figure)
            yield figure, of_figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "picture", keeping)
        text = analyze(Options(runs, folder / "out", workers=1)).read_text()
    with (folder / "out" / "measures.csv").open() as file:
        rows = list(csv.DictReader(file))
    return SimpleNamespace(folder=folder, runs=runs, rows=rows, report=text, axes=axes)


def column(rows: list[dict], run: str, step: int, name: str) -> np.ndarray:
    """One figure of a run's linears at a step."""
    return np.array([float(row[name]) for row in rows if row["run"] == run and int(row["step"]) == step])


@pytest.mark.slow
def test_the_report_gives_means_over_linears_under_their_own_names(shown):
    after = shown.report.split("At the end, mean over linears", 1)[1].split("</table>")[0]
    heads = [unescape(head) for head in re.findall(r"<th>(.*?)</th>", after)]
    body = [
        re.findall(r"<td[^>]*>(.*?)</td>", line) for line in after.split("<tbody>")[1].split("</tr>") if "<td" in line
    ]
    assert heads[3:8] == ["ΔΣ", "ΔD", "ΔD matched", "ΔD clustered", "ΔD subspace"]
    names = [field.name for field in fields(Figures)]
    apart: list[float] = []
    assert len(heads) == 3 + len(names)
    for cells in body:
        for name, cell in zip(names, cells[3:], strict=True):
            if cells[0] == "llama-lora" and name[-2:] in ("_u", "_v"):
                assert cell == "–"
                continue
            values = column(shown.rows, cells[0], 6, name)
            assert len(values) == 2
            mean = values.mean()
            if name == "swapping":  # the share of the means, as the picture tells it
                literal, clustered = (
                    column(shown.rows, cells[0], 6, f"delta_d{which}").mean() for which in ("", "_clustered")
                )
                apart.append(abs(mean - (1 - clustered / literal)))
                mean = 1 - clustered / literal
            assert cell == f"{mean:.4g}", name
    assert [cells[0] for cells in body] == ["llama-sorsa", "llama-lora"]
    assert max(apart) > 0.01  # the mean of the shares is another number


@pytest.mark.slow
def test_the_condition_of_weights_is_drawn_against_that_of_the_start(shown):
    ax = shown.axes["condition"][2]
    for line, run in zip(ax.get_lines(), ("llama-sorsa", "llama-lora"), strict=True):
        kappa = np.array([column(shown.rows, run, step, "condition_w") for step in (0, 2, 4, 6)])
        assert line.get_ydata() == pytest.approx((kappa / kappa[0]).mean(axis=1))


@pytest.mark.slow
def test_the_picture_of_swapping_stacks_turn_mixing_and_swapping(shown):
    for ax, run in zip(shown.axes["swapping"], ("llama-sorsa", "llama-lora"), strict=False):
        literal, matched, clustered = (
            np.array([column(shown.rows, run, step, f"delta_d{which}").mean() for step in (0, 2, 4, 6)])
            for which in ("", "_matched", "_clustered")
        )
        assert 0 < clustered[-1] <= matched[-1] <= literal[-1]
        spans = [(collection.get_label(), collection.get_paths()[0].vertices[:, 1]) for collection in ax.collections]
        assert [label for label, _ in spans] == ["turned", "mixed among nearly equal", "only swapped order"]
        for (_, y), top in zip(spans, (clustered, matched, literal), strict=True):
            assert y.max() == pytest.approx(top.max())
        [text] = [text.get_text() for text in ax.texts]
        turned = clustered[-1] / literal[-1]
        assert f"{1 - turned:.0%} of it no turn" in text
        assert f"{turned:.0%}" != f"{1 - turned:.0%}"


@pytest.mark.slow
def test_rows_have_the_share_that_is_no_turn(shown):
    for row in shown.rows:
        literal, clustered = float(row["delta_d"]), float(row["delta_d_clustered"])
        assert literal >= float(row["delta_d_matched"]) >= clustered
        assert float(row["swapping"]) == pytest.approx((literal - clustered) / literal if literal else 0, abs=1e-12)


@pytest.mark.slow
def test_an_analysis_remembers_the_runs_that_a_later_command_leaves_out(shown, tmp_path):
    first, second = shown.runs
    analyze(Options([second], shown.folder / "out", workers=1))
    assert set(json.loads((shown.folder / "out" / "analysis.json").read_text())["runs"]) == {first.name, second.name}
    other, _ = handmade(tmp_path, "llama", "sorsa")
    (other / "adapter" / adapter_file.TRAINED).write_bytes((other / "adapter" / adapter_file.INITIAL).read_bytes())
    adapter_file.record_digests(other / "adapter")
    with pytest.raises(ValueError, match="holds another run named llama-sorsa"):
        analyze(Options([other], shown.folder / "out"))


def test_processes_are_as_many_as_cores_jobs_and_memory_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    jobs = [Job(Path("run"), None, "run", f"l{i}", (0,), (100, 10 * (i + 1)), "float64", 4) for i in range(20)]
    largest = 100 * 200 * 8
    assert workers_for(jobs, 2**60) == 8
    assert workers_for(jobs[:3], 2**60) == 3
    assert workers_for(jobs, 5 * compute.MATRICES * largest) == 5
    assert workers_for(jobs, 5 * compute.MATRICES * largest - 1) == 4
    assert workers_for([replace(job, dtype="float32") for job in jobs], 3 * compute.MATRICES * largest) == 6
    assert workers_for(jobs, 0) == 1


PARENT = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from sorsa_ds.study.analysis import compute
if __name__ == "__main__":
    context = get_context("forkserver")
    stay, leave = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(1, context, initializer=compute._begin, initargs=(context.SimpleQueue(), stay))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        worker = psutil.Process(int(parent.stdout.readline()))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    try:
        worker.wait(timeout=60)
    except psutil.TimeoutExpired:
        ended = worker.status() == psutil.STATUS_ZOMBIE  # gone, and nobody has asked for its status
        if not ended:
            worker.kill()
        assert ended


def engine_of(model: torch.nn.Module) -> SimpleNamespace:
    """What a recorder asks of an engine of one rank."""
    parameters = dict(model.named_parameters())
    masters = SimpleNamespace(fragments=[], full=lambda name, *_: parameters[name].detach().clone())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return SimpleNamespace(trained_shapes=shapes, masters=masters, device=torch.device("cpu"))


def test_whole_weights_are_stored_without_their_biases(tmp_path):
    base = save("llama-tied-bias", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    linears = stored_linears(skeleton(base, LoadingConfig()), RunConfig(method="full"))
    assert model.get_submodule(linears[0].name).bias is not None
    (tmp_path / "run").mkdir()
    written = SnapshotRecorder(tmp_path / "run", engine_of(model), [f"{target.name}." for target in linears], 0)
    written.take(2)
    written.finish()
    assert set(load_file(snapshot_path(tmp_path / "run", 2))) == {f"{target.name}.weight" for target in linears}


def test_a_full_disk_is_told_and_later_snapshots_are_taken(tmp_path, monkeypatch, capsys):
    base = save("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    linears = stored_linears(skeleton(base, LoadingConfig()), RunConfig(method="full"))
    (tmp_path / "run").mkdir()
    written = SnapshotRecorder(tmp_path / "run", engine_of(model), [f"{target.name}." for target in linears], 0)

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "save_file", full)
        written.take(1)
        written.finish()
    told = "".join(capsys.readouterr())
    assert "step-000001.safetensors: cannot be written" in told and "No space left" in told
    assert not list((tmp_path / "run").rglob("step-*"))
    written.take(2)
    written.finish()
    assert snapshot_path(tmp_path / "run", 2).exists()
