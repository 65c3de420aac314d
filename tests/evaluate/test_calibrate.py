"""Directions that a base model uses least, against plain torch; what training makes of them; refusals."""

import os
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.evaluate import calibrate as calibrating
from sorsa_ds.evaluate.base_samples import Wanted, draw, openings
from sorsa_ds.evaluate.calibrate import calibrate, check_output, input_moments
from sorsa_ds.evaluate.calibrate_options import CalibrateOptions, parse
from sorsa_ds.export.command import Options as ExportOptions
from sorsa_ds.export.command import export
from sorsa_ds.model.input_directions import Origin, write_directions
from sorsa_ds.model.targets import Target
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.peft.convert import from_peft, to_peft
from tests.helpers.architectures import CONFIGS
from tests.helpers.exported import layers_by_hand, logits
from tests.helpers.projects import make
from tests.helpers.runs import assert_learned_the_same, metrics, train, trained
from tests.helpers.worlds import run_ranks

SAMPLES, TOKENS = 40, 60


def calibrated(project: Path, name: str, room: int | None = None, **changes) -> calibrating.Calibrated:
    """The command in a rank of its own, with the project's cache.

    Args:
        room: bytes of second moments in one pass over the texts.
    """
    asked = {"samples": SAMPLES, "sample_tokens": TOKENS, "rank": 8, **changes}
    options = CalibrateOptions(str(project / "model"), project / name, **asked)
    return run_ranks(1, _calibrated, project, options, room)[0]


def _calibrated(project, options, room):
    os.environ["SORSA_CACHE"] = str(project / "cache")
    calibrating.ROOM = room or calibrating.ROOM
    return calibrate(options)


def by_hand(folder: Path, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """E[x x^T] (N, N) of every linear but the head, of the inputs of all tokens at once, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            module.register_forward_hook(lambda _, given, out, name=name: inputs.setdefault(name, []).append(given[0]))
    with torch.no_grad():
        for text in ids:
            model(torch.tensor([text]))
    rows = {name: torch.cat([one[0] for one in parts]) for name, parts in inputs.items()}
    return {name: x.t() @ x / len(x) for name, x in rows.items()}


def written_by(folder: Path, seed: int) -> list[list[int]]:
    """The texts that the base model writes."""
    tokenizer = load_tokenizer(folder, LoadingConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [one.ids for one in draw(model, tokenizer, openings(tokenizer, None), Wanted(SAMPLES, TOKENS, seed), 8)]


def check_least_used(found: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], rank: int) -> None:
    """The rows are orthonormal, and the inputs have in them what they have in the smallest eigenvectors, one by one."""
    assert {name.removesuffix(".directions") for name in found if name.endswith(".directions")} == set(moments)
    for name, moment in moments.items():
        D = found[f"{name}.directions"].double()
        torch.testing.assert_close(D @ D.t(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
        used = torch.linalg.eigvalsh(moment)
        torch.testing.assert_close((D @ moment @ D.t()).diagonal(), used[:rank], rtol=1e-3, atol=1e-7 * float(used[-1]))
        assert used[rank] > 1.05 * used[0], "all directions alike cannot tell the least used from others"


@pytest.mark.slow
@pytest.mark.parametrize("like", ["llama", "gpt2"])
def test_the_least_used_directions_are_those_of_plain_torch(tmp_path, like):
    make(tmp_path, CONFIGS[like])
    done = calibrated(tmp_path, "whole")
    moments = by_hand(tmp_path / "model", ids := written_by(tmp_path / "model", seed=1))
    check_least_used(load_file(tmp_path / "whole"), moments, rank=8)
    assert (done.linears, done.tokens, done.left_out) == (len(moments), sum(map(len, ids)), [])
    shares = [torch.linalg.eigvalsh(moment)[:16].sum() / moment.trace() for moment in moments.values()]
    assert done.share == pytest.approx(float(sum(shares) / len(shares)), rel=1e-3)
    calibrated(tmp_path, "in-passes", room=1)
    one, other = load_file(tmp_path / "whole"), load_file(tmp_path / "in-passes")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_of_a_given_text_every_token_counts_once(project):
    (project / "text.txt").write_text("There were three apples, and then there were two. " * 30)
    done = calibrated(project, "of-text", data=str(project / "text.txt"), samples=None, sample_tokens=None)
    ids = load_tokenizer(project / "model", LoadingConfig())((project / "text.txt").read_text())["input_ids"]
    assert done.tokens == len(ids) > 256, "it takes several windows"
    windows = [ids[:256], *(ids[start : start + 255] for start in range(256, len(ids), 255))]
    check_least_used(load_file(project / "of-text"), by_hand(project / "model", windows), rank=8)


@pytest.mark.slow
def test_linears_that_too_few_tokens_reach_are_left_out_and_told(project, capfd):
    done = calibrated(project, "of-few", samples=1, sample_tokens=50)
    assert [name.rpartition(".")[2] for name in done.left_out] == ["down_proj", "down_proj"], "which have 76 inputs"
    assert "2 linears see fewer tokens than they have inputs" in capfd.readouterr().out
    with pytest.raises(AssertionError, match=r"has no input directions of model.layers.0.mlp.down_proj"):
        train(project, "few", "sorsa.triplets=null_space", f"sorsa.directions={project / 'of-few'}")
    with pytest.raises(AssertionError, match="tokens are fewer than any linear has inputs: --samples"):
        calibrated(project, "of-none", samples=1, sample_tokens=3)
    assert not (project / "of-none").exists()


@pytest.mark.slow
def test_a_broken_model_is_refused_by_the_layers_name(tmp_path):
    make(tmp_path, CONFIGS["llama"])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.mlp.gate_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text("There were three apples, and then there were two. " * 30)
    with pytest.raises(AssertionError, match=r"the inputs of model.layers.0.mlp.down_proj hold NaN or Inf"):
        calibrated(tmp_path, "nan", data=str(tmp_path / "text.txt"), samples=None, sample_tokens=None)
    assert not (tmp_path / "nan").exists()


def test_a_tensor_that_changes_between_two_linears_is_taken_as_each_has_seen_it():
    class Twice(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            self.kept = torch.empty(1, 2)

        def forward(self, input_ids, use_cache):
            self.kept.copy_(input_ids)
            self.a(self.kept)
            self.kept.mul_(10)
            self.b(input=self.kept)

    targets = [Target(name, 2, 2, 1, bias=True, transposed=False) for name in "ab"]
    found = input_moments(Twice(), targets, [[1, 2], [3, 4]])
    expected = torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64)
    torch.testing.assert_close(found["a"].sum_NN, expected.t() @ expected)
    torch.testing.assert_close(found["b"].sum_NN, 100 * expected.t() @ expected)
    assert found["a"].tokens == found["b"].tokens == 2


def test_products_are_not_rounded_to_tf32_while_inputs_are_measured():
    class Asked(torch.nn.Module):
        device, precision = torch.device("cpu"), None

        def forward(self, input_ids, use_cache):
            self.precision = torch.get_float32_matmul_precision()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        input_moments(asked := Asked(), [], [[1]])
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked.precision == "highest"


def test_what_is_there_already_is_not_written_over(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("something else")
    for path, said in (
        (tmp_path / "model", "is there, and is no file of directions"),
        (tmp_path / "file", "is there, and is no file of directions"),
        (tmp_path / "file" / "below", "cannot be written"),
        (tmp_path / "model" / "more.safetensors", "would lie among the files of the base model"),
    ):
        with pytest.raises(ValueError, match=said):
            check_output(path, tmp_path / "model")
    write_directions(tmp_path / "old", {}, Origin("BASE", "texts", 0))
    check_output(tmp_path / "old", tmp_path / "model")


@pytest.fixture(scope="module")
def directions(project):
    calibrated(project, "directions")
    return ["sorsa.triplets=null_space", f"sorsa.directions={project / 'directions'}"]


@pytest.mark.slow
def test_training_begins_in_the_directions_and_is_the_same_at_every_stage(project, directions):
    whole, _ = train(project, "one-rank", *directions, ranks=1, ds="stage0")
    begun, file = load_file(whole / "adapter" / "initial_factors.safetensors"), load_file(project / "directions")
    for name in [name for name in begun if name.endswith(".V")]:
        V, D = begun[name], file[name.replace(".V", ".directions")][:4]
        torch.testing.assert_close(V @ V.t(), D.t() @ D, rtol=0, atol=1e-5)
    moved = [float((tensor - begun[name]).norm()) for name, tensor in trained(whole).items()]
    assert min(moved) > 0
    for name, ranks, ds in (("two-ranks", 2, "zero2"), ("cut", 2, "zero3")):
        other, _ = train(project, name, *directions, ranks=ranks, ds=ds)
        assert_learned_the_same(other, whole)
    packed = ["residual.storage=nf4", "train.max_start_gap=9"]
    one, _ = train(project, "packed", *directions, *packed, ranks=1, ds="stage0")
    other, _ = train(project, "packed-cut", *directions, *packed)
    assert_learned_the_same(other, one)


@pytest.mark.slow
def test_what_was_trained_there_is_exported_and_converted_without_the_file(project, directions, tmp_path):
    run, _ = train(project, "exported", *directions, ranks=1, ds="stage0")
    (project / "directions").rename(project / "moved")
    run_ranks(1, export, ExportOptions(run, "merged", tmp_path / "merged"))
    to_peft(run / "adapter", tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32)
    in_peft = logits(PeftModel.from_pretrained(model, tmp_path / "peft"))
    (project / "moved").rename(project / "directions")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, weight in layers_by_hand(run).items():
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(in_peft, logits(merged), rtol=1e-4, atol=1e-4)
    for name, tensor in trained(run).items():
        assert torch.equal(load_file(tmp_path / "back" / "trained_factors.safetensors")[name], tensor)


@pytest.mark.slow
def test_a_run_goes_on_without_the_file(project, directions):
    expected, _ = train(project, "uninterrupted", *directions)
    run, _ = train(project, "interrupted", *directions, stop_at=3)
    (project / "directions").rename(project / "moved")
    train(project, "interrupted", *directions, "--resume=auto")
    (project / "moved").rename(project / "directions")
    assert metrics(run, "loss") == metrics(expected, "loss")


@pytest.mark.slow
def test_directions_of_another_model_stop_the_run_before_a_step(project, directions, tmp_path):
    other = make(tmp_path, CONFIGS["llama"])
    with pytest.raises(AssertionError, match=r"was made from .*, whose model.layers.0.*has other weights"):
        train(project, "foreign", *directions, f"model={other / 'model'}")
    with pytest.raises(AssertionError, match=r"has 8 directions of .*--rank 9"):
        train(project, "rank", *directions, "adapter.rank=9")


def test_what_cannot_be_calibrated_is_refused_by_name(tmp_path, monkeypatch):
    words = ["--model", "m", "--output", str(tmp_path / "file")]
    for more, said in (
        (["--limit", "3"], "--limit is of a text"),
        (["--rank", "0"], "--rank"),
        (["--seed", "-1"], "--seed"),
        (["--data", "text", "--samples", "3"], "--samples is of what the model writes"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            parse([*words, *more])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="calibrate works in one process"):
        calibrate(parse(words))
