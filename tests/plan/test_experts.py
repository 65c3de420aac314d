"""The plan of mixtures of experts against live tensors, counted flops and bytes of real engines."""

import pytest

from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.plan.speed import flops
from sorsa_ds.plan.traffic import traffic
from tests.helpers.expert_models import save_experts
from tests.helpers.plans import job_of, live_bytes, live_flops, live_moved, live_saved
from tests.helpers.worlds import run_ranks

NAMES = ["mixtral", "qwen3_moe", "gpt_oss"]
LIVE = {
    "mixtral": [(0, "fp32", "auto"), (3, "mixed", "nf4")],
    "qwen3_moe": [(3, "bf16", "int8"), (1, "mixed", "nf4_double")],
    "gpt_oss": [(3, "mixed", "auto"), (2, "fp32", "nf4")],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_experts(name, tmp_path_factory.mktemp("experts") / name) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parameters_residual_and_optimizer_are_the_live_tensors_bytes(folders, name):
    found = run_ranks(2, live_bytes, folders[name], LIVE[name])
    for i, (stage, precision, storage) in enumerate(LIVE[name]):
        job = job_of(stage, precision, storage, gpus=2)
        planned = memory(job, facts(folders[name], job)).gpu
        for kind in ("residual", "frozen", "trained", "masters", "moments"):
            largest = max(rank[i].get(kind, 0) for rank in found)
            assert planned[kind] == largest, (stage, precision, storage, kind)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_backward_is_what_autograd_saves(folders, name, precision):
    job = job_of(0, precision, length=60)
    kept = facts(folders[name], job).kept
    assert kept.counted
    [saved] = run_ranks(1, live_saved, folders[name], 60, precision)
    print(name, precision, kept.rest + sum(kept.blocks), saved)
    assert kept.rest + sum(kept.blocks) == pytest.approx(saved, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_products(folders, name):
    job = job_of(0, length=20)
    found = facts(folders[name], job)
    [counted] = run_ranks(1, live_flops, folders[name], 20)
    print(name, flops(job, found), counted)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_over_the_wire_are_those_of_the_collectives(folders, checkpointing):
    counted = run_ranks(2, live_moved, folders["mixtral"], checkpointing)[0]
    job = job_of(3, gpus=2, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing)
    moved = traffic(job, facts(folders["mixtral"], job)).inside
    gathers = moved["frozen parameters"] + moved["trained parameters"]
    print(gathers, counted["gather"], moved["Gram matrices"], counted["gram"])
    assert (0.8 if checkpointing else 0.95) * gathers < counted["gather"] <= gathers
    assert moved["Gram matrices"] == pytest.approx(counted["gram"], rel=0.3)
