"""What a run says of its memory when it begins, what it refuses, and the micro-batch that it takes."""

import io
import os
import re
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
from torch import nn

from sorsa_ds.config.command_line import Errors, load_settings, split
from sorsa_ds.config.schema import RunConfig, TrainConfig
from sorsa_ds.plan import advice
from sorsa_ds.plan.beside_tensors import CONTEXT
from sorsa_ds.plan.check import fit_memory
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import HEADROOM, memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.runtime.memory import GIB
from sorsa_ds.train.options import parse
from tests.helpers.architectures import save
from tests.helpers.plans import fake_gpu, job_of
from tests.helpers.projects import settings
from tests.helpers.worlds import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("check"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


def arguments(folder, job) -> tuple:
    return folder, job.config, job.given, job.resolved, job.precision, job.storage


def refusal(folder, job) -> str:
    with pytest.raises(ValueError) as caught:
        fit_memory(*arguments(folder, job))
    return str(caught.value)


def free_host(monkeypatch, nbytes: int) -> None:
    monkeypatch.setattr("sorsa_ds.plan.check.free_memory", lambda: nbytes)


@pytest.mark.parametrize(("gpu", "free"), [(None, 100), (80, 0), (0, 700)])
def test_a_run_says_the_numbers_that_it_is_refused_for(folder, monkeypatch, capsys, gpu, free):
    """gpu, free: GiB and MiB of memory; 100 MiB are too little on a CPU, and 700 enough beside a GPU."""
    monkeypatch.setattr("sorsa_ds.plan.check.advice", lambda *_, **__: [])
    free_host(monkeypatch, free * 2**20)
    if gpu is not None:
        fake_gpu(monkeypatch, total=gpu * GIB, free=gpu * GIB)
    job = job_of(0)
    told = r"about ([0-9.]+) GiB per rank, more than the ([0-9.]+ GiB .*) that it may"
    [refused] = re.findall(told, refusal(folder, job))
    assert " of ".join(refused) in capsys.readouterr().out
    monkeypatch.setattr("sorsa_ds.plan.check.size_micro_batch", None)
    unchecked = replace(job, config=replace(job.config, train=replace(job.config.train, check_memory=False)))
    assert fit_memory(*arguments(folder, unchecked)) is job.resolved
    assert capsys.readouterr().out == ""


def test_what_other_processes_hold_of_a_gpu_is_not_planned_with(folder, monkeypatch, capsys):
    """What this process holds itself is: PyTorch's cache, and the CUDA context that is not in what is free."""
    free_host(monkeypatch, 64 * GIB)
    fake_gpu(monkeypatch, total=80 * GIB, free=GIB // 8)
    told = refusal(folder, job_of(0))
    assert "GiB on its GPU that it may take here" in told
    others = f"Other processes hold about {(80 * GIB - GIB // 8 - CONTEXT) / GIB:.2f} of the 80.00 GiB of the GPU of "
    assert others in told and others in capsys.readouterr().out
    fake_gpu(monkeypatch, total=80 * GIB, free=GIB // 8, held=79 * GIB)
    fit_memory(*arguments(folder, job_of(0)))
    assert "of 79.71 GiB on its GPU" in (said := capsys.readouterr().out)
    assert "Other processes" not in said
    fake_gpu(monkeypatch, total=80 * GIB, free=80 * GIB, held=GIB)
    fit_memory(*arguments(folder, job_of(0)))
    assert "of 80.00 GiB on its GPU" in capsys.readouterr().out


def test_a_cpu_holds_no_context_of_a_gpu(folder, monkeypatch, capsys):
    free_host(monkeypatch, 64 * GIB)
    fit_memory(*arguments(folder, job_of(0)))
    assert "context 0.00" not in (said := capsys.readouterr().out)
    on_a_gpu = memory(job_of(0), facts(folder, job_of(0)))
    assert f"rank: {(on_a_gpu.total + on_a_gpu.total_host - CONTEXT) / GIB:.2f} of 64.00 GiB of free memory" in said


def default_job(gpu: int) -> Job:
    """The job of `make train` on one GPU of so many bytes."""
    config = parse([]).config
    return Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware(gpu_memory=gpu))


@pytest.mark.slow
def test_the_default_job_is_refused_on_a_small_gpu_with_settings_that_fit_there(monkeypatch, embedded_model):
    """It is refused, not changed: what would fit can be copied from the message, and fits."""
    monkeypatch.setattr("sorsa_ds.plan.advice._STEPS", advice._STEPS[:1])  # each takes seconds to plan
    free_host(monkeypatch, 64 * GIB)
    small = 2 * GIB
    fake_gpu(monkeypatch, total=small, free=small - CONTEXT)
    job = default_job(small)
    told = refusal(embedded_model, job)
    words, gib = re.findall(r"^  (train\.\S.*) \(([0-9.]+) GiB\)$", told, re.M)[0]
    options, overrides = split(words.split(), [], Errors())
    again = Job.of(load_settings(RunConfig, None, overrides), job.given, job.hardware)
    needed = memory(again, facts(embedded_model, again))
    assert not options and f"{needed.total / GIB:.2f}" == gib and needed.total < small


def automatic(length: int, **train) -> Job:
    """A job for the tiny model that leaves the micro-batch of a global batch of 12 to the planner."""
    job = job_of(0, length=length)
    config = replace(
        job.config, train=TrainConfig(precision="fp32", micro_batch_size="auto", global_batch_size=12, **train)
    )
    return Job.of(config, job.given, job.hardware)


def test_auto_is_the_largest_micro_batch_for_what_is_free(folder, monkeypatch, capsys):
    """6 fits beside what other processes hold, 12 would on the whole GPU; 12 does on a CPU with as much memory."""
    job = automatic(4000)
    assert job.resolved.micro_choices == (1, 2, 3, 4, 6, 12)
    needed = {}
    for micro in (6, 12):
        sized = replace(job, resolved=job.resolved.with_micro_batch(micro))
        needed[micro] = memory(sized, facts(folder, sized)).total
    free = int(needed[6] / (1 - HEADROOM)) + 2**20
    free_host(monkeypatch, 64 * GIB)
    fake_gpu(monkeypatch, total=80 * GIB, free=free - CONTEXT)
    resolved = fit_memory(*arguments(folder, job))
    assert (resolved.micro_batch_size, resolved.gradient_accumulation_steps, resolved.global_batch_size) == (6, 2, 12)
    assert (resolved.ds["train_micro_batch_size_per_gpu"], resolved.ds["gradient_accumulation_steps"]) == (6, 2)
    assert resolved.ds["train_batch_size"] == 12 and resolved.micro_choices == ()
    plans, beyond = (f"{needed[micro] / GIB:.1f}" for micro in (6, 12))
    said = capsys.readouterr().out
    assert f"Micro-batch 6: plans {plans} of {free / GIB:.1f} GiB on its GPU (12 would take {beyond}, " in said
    assert "Other processes hold about" in said
    fake_gpu(monkeypatch, total=80 * GIB, free=79 * GIB)
    assert fit_memory(*arguments(folder, job)).micro_batch_size == 12
    assert "(the global batch of 12 has no more for a rank)" in capsys.readouterr().out


@pytest.mark.parametrize("check", [False, True])
def test_auto_is_settled_also_where_nothing_is_refused(folder, monkeypatch, check):
    """Not even one example fits: that is refused, or trained in micro-batches of one where the check is off."""
    free_host(monkeypatch, 64 * GIB)
    fake_gpu(monkeypatch, total=GIB // 2, free=0)
    job = automatic(100, check_memory=check)
    if check:
        assert "GiB on its GPU that it may take here" in refusal(folder, job)
    else:
        resolved = fit_memory(*arguments(folder, job))
        assert (resolved.micro_batch_size, resolved.gradient_accumulation_steps) == (1, 12)


def _chosen(folder, job, free):
    """What a rank with so much free memory chooses, and what it says."""
    from sorsa_ds.runtime import collectives

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr("sorsa_ds.plan.check.free_memory", lambda: free[collectives.rank()])
        return fit_memory(*arguments(folder, job)).micro_batch_size, said.getvalue()


@pytest.mark.slow
def test_all_ranks_choose_what_fits_the_one_that_has_least(folder):
    job = automatic(8000)
    sized = replace(job, resolved=job.resolved.with_micro_batch(3), hardware=Hardware(host_memory=0, device="cpu"))
    needed = memory(sized, facts(folder, sized))
    least = 2 * int((needed.total + needed.total_host) / (1 - HEADROOM) + 2**20)
    for free in ([64 * GIB, least], [least, 64 * GIB]):
        (first, said), (second, silence) = run_ranks(2, _chosen, folder, job, free)
        assert first == second == 3
        assert "Micro-batch 3: plans" in said and "of free memory" in said
        assert silence == ""


def _refused(project):
    """What stops this rank of a run that is too large."""
    from sorsa_ds.train.setup import assemble

    os.environ["SORSA_CACHE"] = str(project / "cache")
    large = ["train.micro_batch_size=400000", "train.global_batch_size=null", "data.max_length=256"]
    with pytest.raises(ValueError) as caught:
        assemble(parse([*settings(project, "plan-no"), *large]))
    return str(caught.value)


@pytest.mark.slow
def test_every_rank_of_a_run_refuses_what_cannot_fit_before_it_makes_a_folder(project, monkeypatch):
    monkeypatch.setattr("sorsa_ds.train.setup.hold_run", None)
    told = run_ranks(2, _refused, project)
    assert all("the run needs about" in one and "launch/plan.py" in one for one in told)
    assert not (project / "runs" / "plan-no").exists()


def test_a_model_that_cannot_be_estimated_is_trained_all_the_same(folder, monkeypatch, capsys):
    def fails(*_, **__):
        raise AttributeError("this configuration has no head_dim")

    monkeypatch.setattr("sorsa_ds.plan.model_facts.kept_for_backward", fails)
    job = job_of(0)
    assert fit_memory(*arguments(folder, job)) is job.resolved
    assert "The memory that this run needs cannot be estimated (AttributeError: this configuration" in (
        capsys.readouterr().out
    )


def test_what_is_wrong_with_the_files_is_told_before_the_memory(folder):
    def refuse(model):
        assert any(isinstance(module, nn.Linear) for module in model.modules()), "no layer is replaced yet"
        raise ValueError("a shard is missing")

    with pytest.raises(ValueError, match="a shard is missing"):
        fit_memory(*arguments(folder, job_of(0)), refuse)
