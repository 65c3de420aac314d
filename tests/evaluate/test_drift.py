"""Drift: KL from the base model against plain torch in float64, the base model's samples and their cache, refusals."""

import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sorsa_ds.evaluate import base_samples
from sorsa_ds.evaluate.backends import divergence
from sorsa_ds.evaluate.backends.likelihood import Likelihood
from sorsa_ds.evaluate.base_samples import Sample, Wanted, draw, kept_samples, openings
from sorsa_ds.evaluate.models import base_of, find_evaluated_model
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.tasks.drift import check_vocabularies, mean_per_token, windows_of_samples
from sorsa_ds.export.command import Options as ExportOptions
from sorsa_ds.export.command import export
from sorsa_ds.train.options import parse
from sorsa_ds.train.setup import assemble
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.evaluated import asked, run
from tests.helpers.llama_tokenizer import llama_tokenizer
from tests.helpers.projects import settings
from tests.helpers.worlds import run_ranks

FEW = dict(task="drift", data=None, max_new_tokens=None, samples=6, sample_tokens=20, seed=3)


def _train(folder, name, *changes):
    """A run in this process, as launch/train.py makes it."""
    os.environ["SORSA_CACHE"] = str(folder / "cache")
    assemble(parse([*settings(folder, name), *changes])).train()


def _measure(project, name, **changes):
    """An evaluation in a rank of its own, with the project's cache; (results, samples)."""
    return run_ranks(changes.pop("ranks", 1), _measured, project, asked(project, name, **{**FEW, **changes}))[0]


def _measured(project, options):
    os.environ["SORSA_CACHE"] = str(project / "cache")
    return run(options)


@pytest.fixture(scope="module")
def project(trained):
    """A model that answers, and a run that went on training it."""
    run_ranks(1, _train, trained, "run", "train.learning_rate=5e-3")
    return trained


@pytest.fixture(scope="module")
def merged(project):
    run_ranks(1, export, ExportOptions(project / "run", "merged", project / "merged"))
    return project / "merged"


def _kept(project):
    return sorted((project / "cache" / "base_samples").glob("*.json"))


def by_hand(base, tuned, texts):
    """(KL per text, base loss, loss) of texts, pairs of ids and the first scored place, token by token in float64."""
    base, tuned = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float64).eval() for m in (base, tuned))
    kl, base_nats, nats, scored = [], [], [], 0
    for ids, first in texts:
        kl.append(0.0)
        for place in range(max(1, first), len(ids)):
            before = torch.tensor([ids[:place]])
            with torch.no_grad():
                p, q = (model(before).logits[0, -1].softmax(-1) for model in (base, tuned))
            kl[-1] += sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)
            base_nats.append(-math.log(p[ids[place]]))
            nats.append(-math.log(q[ids[place]]))
            scored += 1
    return kl, sum(base_nats) / scored, sum(nats) / scored, scored


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "batch"), [(2, 5), (1, 4)])  # two ranks make the samples
def test_drift_is_the_divergence_that_plain_torch_computes_in_float64(project, merged, ranks, batch):
    results, _ = _measure(project, f"run-{ranks}", model=str(project / "run"), ranks=ranks, batch_size=batch)
    [file] = _kept(project)
    texts = json.loads(file.read_text())["samples"]
    kl, base_loss, loss, scored = by_hand(project / "model", merged, texts)
    assert (results["tokens"], results["samples"]) == (scored, 6)
    assert results["kl"] == pytest.approx(sum(kl) / scored, rel=1e-4)
    assert results["kl"] > 1e-3, "the run has learned something"
    assert results["base_loss"] == pytest.approx(base_loss, rel=1e-5)
    assert results["loss"] == pytest.approx(loss, rel=1e-5)
    counts = np.array([len(ids) - first for ids, first in texts])
    residuals = np.array(kl) - sum(kl) / scored * counts
    assert results["kl_stderr"] == pytest.approx(math.sqrt(6 / 5 * (residuals**2).sum()) / scored, rel=1e-3)


@pytest.mark.slow
def test_a_run_its_adapter_and_its_exports_drift_alike_from_the_samples_that_were_made_once(project, merged):
    run_ranks(1, export, ExportOptions(project / "run", "lora", project / "lora"))
    found = {
        "run": _measure(project, "of-run", model=str(project / "run")),
        "adapter": _measure(project, "of-adapter", model=str(project / "run" / "adapter")),
        "lora": _measure(project, "of-lora", model=str(project / "lora")),
        "merged": _measure(project, "of-merged", model=str(merged), base=str(project / "model")),
    }
    [kept] = _kept(project)
    before = kept.stat().st_mtime_ns
    for results, _ in found.values():
        assert results["kl"] == pytest.approx(found["run"][0]["kl"], rel=1e-3)
        assert results["base_loss"] == found["run"][0]["base_loss"]
    _measure(project, "again", model=str(project / "run"), batch_size=3)
    assert _kept(project) == [kept]
    assert kept.stat().st_mtime_ns == before
    _measure(project, "other-seed", model=str(project / "run"), seed=4)
    assert len(_kept(project)) == 2
    next(file for file in _kept(project) if file != kept).unlink()


@pytest.mark.slow
def test_a_model_has_not_moved_from_itself(project):
    results, samples = _measure(project, "self", base=str(project / "model"))
    assert results["kl"] == 0
    assert results["kl_stderr"] == 0
    assert results["loss"] == results["base_loss"]
    assert {sample["kl"] for sample in samples} == {0}


@pytest.mark.slow
def test_the_drift_on_a_text_is_measured_token_by_token(project, merged):
    text = "There were three apples, and then there were two. Who ate it? "
    (project / "text.txt").write_text(text)
    changes = dict(samples=None, sample_tokens=None, seed=None, data=str(project / "text.txt"), window=64, stride=63)
    results, _ = _measure(project, "text", model=str(merged), base=str(project / "model"), **changes)
    ids = AutoTokenizer.from_pretrained(project / "model")(text)["input_ids"]
    assert len(ids) <= 64, "one window has the text"
    [kl], base_loss, loss, scored = by_hand(project / "model", merged, [(ids, 1)])
    assert (results["samples"], results["tokens"], results["kl_stderr"]) == (1, scored, None)
    assert results["kl"] == pytest.approx(kl / scored, rel=1e-4)
    assert results["base_loss"] == pytest.approx(base_loss, rel=1e-5)
    assert results["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_samples_are_made_anew(project, capfd, damage):
    _measure(project, f"whole-{damage}", model=str(project / "run"))
    [kept] = _kept(project)
    whole = kept.read_text()
    if damage == "cut":
        kept.write_text(whole[:100])
    else:
        changed = json.loads(whole)
        changed["samples"][0][0][3] += 1
        kept.write_text(json.dumps(changed))
    _measure(project, f"damaged-{damage}", model=str(project / "run"))
    assert f"{kept}: damaged" in capfd.readouterr().out
    assert kept.read_text() == whole


@pytest.mark.slow
def test_a_plain_model_that_does_not_say_its_base_is_refused_until_its_card_does(project, merged):
    found = find_evaluated_model(str(merged), against_base=True)
    with pytest.raises(ValueError, match="--base is missing: .*merged is a plain model that does not say"):
        base_of(found, str(merged), None)
    carded = project / "carded"
    shutil.copytree(merged, carded)
    (carded / "README.md").write_text(f"---\nbase_model: {project / 'model'}\n---\n# Merged\n")
    name, base = base_of(find_evaluated_model(str(carded)), str(carded), None)
    assert (name, base.folder) == (str(project / "model"), project / "model")
    (carded / "README.md").write_text("---\nbase_model: [one, two]\n---\n")
    with pytest.raises(ValueError, match="--base is missing"):
        base_of(find_evaluated_model(str(carded)), str(carded), None)


@pytest.mark.slow
def test_models_with_other_vocabularies_are_refused_by_name(project, tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=400,
        max_position_embeddings=64,
    )  # fmt: skip
    larger = tmp_path / "larger"
    LlamaForCausalLM(config).save_pretrained(larger)
    chat_tokenizer().save_pretrained(larger)
    size = len(chat_tokenizer())
    with pytest.raises(AssertionError, match=f"a vocabulary of 400 tokens and its base model.*one of {size}"):
        _measure(project, "larger", model=str(larger), base=str(project / "model"))
    run_ranks(1, _train, project, "grown", "data.new_tokens=[<new>]", "train.steps=1")
    with pytest.raises(AssertionError, match=rf"a vocabulary of {size + 1} tokens.*data\.new_tokens"):
        _measure(project, "grown-drift", model=str(project / "grown"))
    with pytest.raises(ValueError, match="the token 'b' is 1 there and 2 here"):
        check_vocabularies("base", {"a": 0, "b": 1}, {"a": 0, "b": 2, "c": 3})
    with pytest.raises(ValueError, match="the token 'b' is 1 there and unknown here"):
        check_vocabularies("base", {"a": 0, "b": 1}, {"a": 0})
    check_vocabularies("base", {"a": 0}, {"a": 0, "c": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "loss", "samples": 3}, "--samples goes with --task drift, not with loss"),
        ({"task": "gsm8k", "seed": 3}, "--seed goes with --task mt_bench or drift"),
        ({"sample_tokens": 3, "data": "x.txt"}, "--sample_tokens is of the base model's own samples, and --data"),
        ({"limit": 3}, "--limit is of a text, which --data names"),
        ({"window": 3}, "--window is of a text"),
        ({"backend": "vllm"}, "only generates"),
        ({"samples": 0}, "--samples: 0 is no integer from 1"),
        ({"seed": 2**32}, "--seed: 4294967296 is no integer from 0 to 4,294,967,295"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"model": "m", "task": "drift", **changes})


@pytest.mark.slow
def test_more_tokens_than_the_model_takes_are_refused(project):
    with pytest.raises(AssertionError, match="256 tokens behind an opening of 5 are more than the 256.*at most 251"):
        _measure(project, "long", model=str(project / "run"), sample_tokens=256)


def _model(vocabulary, like=None):
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=vocabulary,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_samples_follow_the_models_probabilities_whatever_the_batch():
    """Token by token without a cache: the token at which the cumulative distribution passes the uniform number."""
    tokenizer = llama_tokenizer()
    model, wanted = _model(len(tokenizer)), Wanted(5, 12, 7)
    samples = draw(model, tokenizer, [[1]], wanted, 2)
    assert samples == draw(model, tokenizer, [[1]], wanted, 5)
    uniform = torch.rand((5, 12), dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for sample, numbers in zip(samples, uniform, strict=True):
        ids = [1]
        for number in numbers:
            with torch.no_grad():
                sums = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).cumsum(-1)
            ids.append(int((sums <= number).sum()))
            if ids[-1] == 2:
                break
        assert sample == Sample(ids, 1)


def test_first_tokens_are_as_frequent_as_the_model_says():
    tokenizer = llama_tokenizer()
    model, count = _model(len(tokenizer)), 4000
    drawn = [one.ids[1] for one in draw(model, tokenizer, [[1]], Wanted(count, 1, 0), count)]
    with torch.no_grad():
        p = model(torch.tensor([[1]])).logits[0, -1].double().softmax(-1).numpy()
    found = np.bincount(drawn, minlength=len(p)) / count
    likely = np.argsort(-p)[:20]
    assert (np.abs(found - p)[likely] < 4 * np.sqrt(p * (1 - p) / count)[likely]).all()


def test_a_base_model_ends_and_a_chat_model_writes_on():
    plain, chat = llama_tokenizer(), chat_tokenizer()
    model = _model(len(plain))
    with torch.no_grad():
        model.lm_head.weight[2] *= 2  # the end comes often
    ended = draw(model, plain, [[1]], Wanted(30, 12, 0), 30)
    assert all(2 not in one.ids[1:-1] for one in ended)
    assert {one.ids[-1] == 2 for one in ended} == {True, False}
    begin = openings(chat, None)
    assert [chat.decode(tokens) for tokens in begin] == ["<|im_start|>", "<|im_start|>user\n"]
    written = draw(_model(len(chat)), chat, begin, Wanted(5, 12, 0), 2)
    assert [one.ids[: one.opened] for one in written] == [begin[number % 2] for number in range(5)]
    assert {len(one.ids) - one.opened for one in written} == {12}
    windows = windows_of_samples(written)
    assert [int((one["labels"] != -100).sum()) for one in windows.values()] == [12] * 5


def test_a_tokenizer_without_a_first_token_takes_its_end_token_or_is_refused():
    tokenizer = llama_tokenizer()
    tokenizer.bos_token = None
    assert openings(tokenizer, None) == [[2]]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no token that begins a text"):
        openings(tokenizer, None)


def test_the_error_is_that_of_a_ratio_and_of_means_where_samples_are_of_one_length():
    means = np.array([0.5, 0.1, 0.9, 0.3])
    mean, error = mean_per_token((means * 10).tolist(), [10] * 4)
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / 2)
    # R = 6 / 6 = 1; the residuals are 1 − 2 = −1, 5 − 4 = 1: sqrt(2 / 1 · 2) / 6 = 1 / 3
    assert mean_per_token([1.0, 5.0], [2, 4]) == pytest.approx((1.0, 1 / 3))
    assert mean_per_token([1.0], [2]) == (0.5, None)


def test_a_token_that_the_base_model_never_writes_adds_nothing_and_parts_are_one_whole(monkeypatch):
    base = torch.tensor([[0.0, -torch.inf, 0.0], [1.0, 2.0, 3.0]])
    tuned = torch.tensor([[0.0, -torch.inf, math.log(3.0)], [0.0, 0.0, 0.0]])
    kl, of_base, of_tuned = divergence._measured(base, tuned, torch.tensor([0, 2]))
    p = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    assert kl.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
                                         (p * np.log(3 * p)).sum()])  # fmt: skip
    assert of_base.tolist() == pytest.approx([math.log(2), -math.log(p[2])])
    assert of_tuned.tolist() == pytest.approx([math.log(4), math.log(3)])
    models = [Likelihood(_model(30), torch.device("cpu"), 0) for _ in range(2)]
    models[1]._model.lm_head.weight.data *= 1.1
    ids = np.arange(1, 25, dtype=np.int32)
    windows = [{"input_ids": ids[:n], "labels": ids[:n]} for n in (24, 9)]
    whole = divergence.divergences(*models, windows)
    monkeypatch.setattr(divergence, "_NUMBERS_AT_ONCE", 60)
    for one, other in zip(divergence.divergences(*models, windows), whole, strict=True):
        assert one == replace(other, kl=pytest.approx(other.kl), base_nats=pytest.approx(other.base_nats),
                              nats=pytest.approx(other.nats))  # fmt: skip


def test_a_cache_that_cannot_be_written_is_told_and_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    base_samples.keep_samples(tmp_path / "file" / "x.json", [Sample([1, 2], 1)])
    assert "are not kept" in capsys.readouterr().out
    assert kept_samples(tmp_path / "none.json", Wanted(1, 1, 0)) is None
    base_samples.keep_samples(tmp_path / "x.json", [Sample([1, 2], 1)])
    assert kept_samples(tmp_path / "x.json", Wanted(1, 1, 0)) == [Sample([1, 2], 1)]
    assert kept_samples(tmp_path / "x.json", Wanted(2, 1, 0)) is None
    assert "1 samples, and 2 are wanted" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_model_drifts_as_plain_torch_says(shared_data, tmp_path):
    base, tuned = shared_data / "models" / "stories260k", tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(base).save_pretrained(tuned)
    results, _ = _measure(tmp_path, "drift", model=str(tuned), base=str(base), samples=4, sample_tokens=40)
    texts = json.loads(_kept(tmp_path)[0].read_text())["samples"]
    kl, base_loss, loss, scored = by_hand(base, tuned, texts)
    assert results["kl"] == pytest.approx(sum(kl) / scored, rel=1e-4)
    assert (results["base_loss"], results["loss"]) == (
        pytest.approx(base_loss, rel=1e-5),
        pytest.approx(loss, rel=1e-5),
    )
    assert 0 < results["kl"] < 1
