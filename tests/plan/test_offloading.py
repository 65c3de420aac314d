"""The host's memory that offloading takes, against the blocks that DeepSpeed makes."""

from dataclasses import replace

import pytest

from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.plan.offloading import taken
from tests.helpers.architectures import save
from tests.helpers.engines import CASES, MICRO, build, ds_config, micro_losses, sequences
from tests.helpers.plans import job_of
from tests.helpers.worlds import run_ranks

OPTIMIZER, BOTH, PARAMETERS = ("optimizer",), ("optimizer", "param"), ("param",)
OFFLOADED = [
    (stage, offloaded, precision, accumulation)
    for stage, offloaded in ((1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, BOTH), (3, PARAMETERS))
    for precision in ("fp32", "bf16")
    for accumulation in (1, 2)
]


def test_pinned_blocks_take_a_power_of_two():
    assert [taken(size, True) for size in (0, 1, 2, 3, 4, 5, 2**30, 2**30 + 1)] == [0, 1, 2, 4, 4, 8, 2**30, 2**31]
    assert taken(2**30 + 1, False) == 2**30 + 1


def offloading(names: tuple[str, ...]) -> dict:
    return {f"offload_{name}": {"device": "cpu", "pin_memory": True} for name in names}


def planned(stage, names, precision, accumulation, gpus) -> Job:
    return job_of(stage, precision, gpus=gpus, zero=offloading(names), gradient_accumulation_steps=accumulation)


def _pinned(folder, cases):
    """For each case, the bytes of every block that DeepSpeed pins on this rank in a step."""
    from deepspeed.accelerator import get_accelerator

    from sorsa_ds.runtime import collectives

    found, blocks = [], []

    def pin(_, tensor, *__, **___):
        blocks.append(tensor.nbytes)
        return tensor.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "pin_memory", pin)
        for stage, names, precision, accumulation in cases:
            ds = ds_config(stage, "", 0.05, accumulation, precision == "bf16")
            ds["zero_optimization"] |= offloading(names) | {"stage3_param_persistence_threshold": 0}
            engine = build(folder, ds, CASES[0] | {"accumulation": accumulation}, precision)
            batch = sequences(MICRO * collectives.world_size() * accumulation)
            engine.train_step(micro_losses(engine, batch, accumulation))
            found.append(list(blocks))
            blocks.clear()
            engine.destroy()
    return found


@pytest.mark.slow
def test_the_blocks_that_deepspeed_pins_are_planned(tmp_path):
    folder = save("llama", tmp_path)
    found = run_ranks(2, _pinned, folder, OFFLOADED)
    for i, case in enumerate(OFFLOADED):
        job = planned(*case, gpus=2)
        host = memory(job, facts(folder, job)).host
        # Master weights of ZeRO-3 and moments lie in memory that is not pinned. No checkpoint is made here.
        left = host["moments"] + (host["masters"] if job.stage == 3 else 0) + host.get("checkpoint copies", 0)
        largest = max(sum(taken(nbytes, True) for nbytes in rank[i]) for rank in found)
        assert sum(host.values()) - left == largest, (case, host)


def test_the_copies_that_a_checkpoint_makes_are_planned(tmp_path):
    """Three fp32 numbers for each trained one, unless none is saved or the numbers are in the host's memory already."""
    model = tmp_path / "model"
    save("llama", model)
    job = planned(0, (), "fp32", 1, gpus=2)
    of_model = facts(model, job)
    assert memory(job, of_model).host["checkpoint copies"] == 12 * of_model.trainable
    never = replace(job, config=replace(job.config, output=replace(job.config.output, save_every=0)))
    for one in (never, planned(1, OPTIMIZER, "fp32", 1, gpus=2)):
        assert "checkpoint copies" not in memory(one, of_model).host


@pytest.mark.slow
def test_memory_that_is_not_pinned_is_planned_as_it_is(tmp_path):
    folder = save("llama", tmp_path)
    for case in OFFLOADED:
        job = planned(*case, gpus=2)
        zero = job.zero | {f"offload_{name}": {"device": "cpu", "pin_memory": False} for name in case[1]}
        loose = replace(job, resolved=replace(job.resolved, ds=job.resolved.ds | {"zero_optimization": zero}))
        model = facts(folder, job)
        rounded, exact = (memory(one, model) for one in (job, loose))
        assert exact.gpu == rounded.gpu
        assert 1 < sum(rounded.host.values()) / sum(exact.host.values()) < 2.2, case
