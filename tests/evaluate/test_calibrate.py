"""Directions that a base model uses least, against plain torch; what training makes of them; refusals."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.evaluate import calibrate as calibrating
from sorsa_ds.evaluate.base_samples import Wanted, draw, openings
from sorsa_ds.evaluate.calibrate import calibrate
from sorsa_ds.evaluate.calibrate_options import CalibrateOptions, parse
from sorsa_ds.model.tokenizer import load_tokenizer
from tests.helpers.architectures import CONFIGS
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
    assert (done.linears, done.tokens, done.unreached) == (len(moments), sum(map(len, ids)), [])
    shares = [torch.linalg.eigvalsh(moment)[:16].sum() / moment.trace() for moment in moments.values()]
    assert done.share == pytest.approx(float(sum(shares) / len(shares)), rel=1e-3)
    calibrated(tmp_path, "in-passes", room=1)
    one, other = load_file(tmp_path / "whole"), load_file(tmp_path / "in-passes")
    assert all(torch.equal(one[name], other[name]) for name in one)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    for name, module in weights.named_modules():
        if f"{name}.images" in one:
            weight = module.weight.t() if like == "gpt2" else module.weight
            expected = (weight @ one[f"{name}.directions"].double().t()).norm(dim=0)
            torch.testing.assert_close(one[f"{name}.images"].double(), expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_text_that_is_given_takes_the_place_of_the_models_own(project):
    (project / "text.txt").write_text("There were three apples, and then there were two. " * 30)
    done = calibrated(project, "of-text", data=str(project / "text.txt"))
    ids = load_tokenizer(project / "model", LoadingConfig())((project / "text.txt").read_text())["input_ids"]
    assert len(ids) > 256, "so that it takes several windows"
    assert done.tokens >= len(ids)
    other = calibrated(project, "of-model")
    assert other.tokens != done.tokens


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
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            parse([*words, *more])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="calibrate works in one process"):
        calibrate(parse(words))
