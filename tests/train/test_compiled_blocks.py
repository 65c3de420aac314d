"""Compiled blocks: the same training as without the compiler, and what becomes of a compiler that fails or is wrong."""

import pytest
import torch
from torch._inductor.exc import InductorError

from sorsa_ds.data.batches import aligned
from sorsa_ds.data.tokenize import IGNORED
from tests.helpers.projects import metrics
from tests.helpers.runs import train

AUTO, ONE = "train.compile=auto", {"ranks": 1, "ds": "zero2"}
COMPILE = torch.compile


def losses(run):
    """The losses of a run's steps, and those of its evaluations."""
    return metrics(run, "loss") + metrics(run, "eval_loss")


@pytest.fixture(scope="module")
def plain(project):
    """The losses of a run without the compiler."""
    return losses(train(project, "plain", **ONE)[0])


@pytest.fixture
def traced(monkeypatch):
    """The compiler up to the making of kernels, which takes most of its time on a CPU."""
    monkeypatch.setattr(
        torch, "compile", lambda one, dynamic, options: COMPILE(one, dynamic=dynamic, backend="aot_eager")
    )


@pytest.mark.slow
def test_inductor_trains_as_eager_kernels_do(project, plain, capfd):
    run, _ = train(project, "compiled", AUTO, **ONE)
    said = capfd.readouterr().out
    assert "Blocks are compiled: on one micro-batch the loss differs by" in said, said
    assert losses(run) == pytest.approx(plain, rel=1e-5)
    assert losses(run) != plain


@pytest.mark.slow
def test_the_compiler_is_given_the_same_computation(project, traced, capfd):
    arguments = ["train.gradient_checkpointing=true", "adapter.alpha=2", "residual.storage=nf4"]
    wanted, _ = train(project, "eager", *arguments, ds="zero1")
    run, _ = train(project, "traced", AUTO, *arguments, ds="zero1")
    seen = capfd.readouterr()
    assert "Blocks are compiled: " in seen.out
    assert "lru_cache" not in seen.err
    assert losses(run) == pytest.approx(losses(wanted), rel=1e-5)


def failing(forward, **_):
    """A compiler that cannot."""

    def compiled(*args, **kwargs):
        raise InductorError(RuntimeError("no kernels today\nand more"), None)

    return compiled


def wrong(forward, **_):
    """A compiler that is wrong by more than bf16 rounds: positions come in reverse order."""

    def compiled(*args, **kwargs):
        return forward(*args, **kwargs).flip(1)

    return compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "told"),
    [(failing, "InductorError: "), (wrong, "on one micro-batch the loss differs by ")],
)
def test_blocks_stay_as_they_are_where_the_compiler_fails_or_is_wrong(project, monkeypatch, capfd, compiler, told):
    """The trial leaves the random numbers alone that dropout takes."""
    plain, _ = train(project, f"without-{compiler.__name__}", "adapter.dropout=0.1", **ONE)
    monkeypatch.setattr(torch, "compile", compiler)
    run, _ = train(project, compiler.__name__, AUTO, "adapter.dropout=0.1", **ONE)
    assert f"Blocks are not compiled: {told}" in capfd.readouterr().out
    assert losses(run) == losses(plain)


@pytest.mark.slow
def test_where_the_compiler_fails_later_blocks_go_on_without_it_and_that_is_said(project, plain, monkeypatch, capfd):
    calls = []

    def late(forward, **_):
        def compiled(*args, **kwargs):
            calls.append(0)
            if len(calls) > 20:
                failing(forward)()
            return forward(*args, **kwargs) * 1.0  # which keeps other tensors than without the compiler

        return compiled

    monkeypatch.setattr(torch, "compile", late)
    run, _ = train(project, "late", AUTO, "train.gradient_checkpointing=true", **ONE)
    seen = capfd.readouterr()
    assert "Blocks are compiled: " in seen.out
    assert seen.err.count("blocks go on without it (train.compile)") == 1
    assert "no kernels today" in seen.err
    assert losses(run) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_under_zero3_blocks_are_not_compiled_and_that_is_said(project, monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", failing)
    train(project, "zero3", AUTO)
    assert "Blocks are not compiled: under ZeRO-3 " in capfd.readouterr().out


@pytest.mark.parametrize(("length", "longest", "wanted"), [(9, 99, 16), (16, 99, 16), (17, 20, 20), (24, 20, 24)])
def test_aligned_batches_have_only_padding_more(length, longest, wanted):
    ids = torch.arange(2 * length).view(2, length)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "position_ids": ids}
    longer = aligned(batch, 7, longest)
    for name, filled in (("input_ids", 7), ("attention_mask", 0), ("labels", IGNORED), ("position_ids", 0)):
        assert longer[name].shape == (2, wanted)
        assert torch.equal(longer[name][:, :length], batch[name])
        assert (longer[name][:, length:] == filled).all()
