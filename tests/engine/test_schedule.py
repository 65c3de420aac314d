"""The learning rate's schedule, against transformers'; and what a run starts without importing."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from sorsa_ds.config.differences import differences
from sorsa_ds.config.schema import RunConfig, TrainConfig
from sorsa_ds.engine.schedules import cosine_with_warmup, schedule
from tests.helpers.engines import CASES, MICRO, build, ds_config, micro_losses, sequences
from tests.helpers.worlds import run_ranks


def rates(make, steps: int, resumed_after: int | None = None) -> list[float]:
    """The learning rate of each step, and of two beyond the end; eta_d is 2e-4.

    resumed_after: after how many steps the scheduler is made anew from its state, as a checkpoint's JSON holds it.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    scheduler, found = make(optimizer), []
    for step in range(steps + 2):
        if step == resumed_after:
            state = json.loads(json.dumps(scheduler.state_dict()))
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
            scheduler = make(optimizer)
            scheduler.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (24, 1), (10, 9), (100, 3), (7, 0)])
def test_the_schedule_is_transformers_to_the_last_bit(steps, warmup):
    from transformers import get_cosine_schedule_with_warmup

    assert rates(cosine_with_warmup(steps, warmup), steps) == rates(
        lambda optimizer: get_cosine_schedule_with_warmup(optimizer, warmup, steps), steps
    )


NAMED = {
    "cosine": ({}, None),
    "linear": ({}, None),
    "constant": ({}, None),
    "constant_with_warmup": ({}, None),
    "cosine_with_min_lr": ({"min_lr_ratio": 0.2}, {"min_lr_rate": 0.2}),
    "warmup_stable_decay": ({"min_lr_ratio": 0.1, "decay_ratio": 0.25}, {"num_decay_steps": 5, "min_lr_ratio": 0.1}),
}
"""Schedule -> its own settings of `train`, and what `transformers.get_scheduler` is told for 20 steps."""


@pytest.mark.parametrize("name", NAMED)
def test_each_name_is_transformers_schedule_also_when_resumed(name):
    from transformers import get_scheduler

    own, told = NAMED[name]
    train = TrainConfig(schedule=name, warmup_ratio=0 if name == "constant" else 0.2, learning_rate=2e-4, **own)
    expected = rates(lambda optimizer: get_scheduler(name, optimizer, 4, 20, told), 20)
    assert rates(schedule(train, 20), 20) == expected
    assert rates(schedule(train, 20), 20, resumed_after=9) == expected


def test_the_schedules_by_their_shape():
    def shares(**settings) -> list[float]:
        return [rate / 2e-4 for rate in rates(schedule(TrainConfig(learning_rate=2e-4, **settings), 10), 10)][:11]

    ramp = [0, 1 / 2]
    assert shares(schedule="constant") == [1] * 11
    assert shares(schedule="constant_with_warmup", warmup_ratio=0.2) == ramp + [1] * 9
    assert shares(schedule="linear", warmup_ratio=0.2) == pytest.approx(ramp + [1 - n / 8 for n in range(9)])
    floor = shares(schedule="cosine_with_min_lr", warmup_ratio=0.2, min_lr_ratio=0.3)
    assert floor == pytest.approx(ramp + [0.3 + 0.35 * (1 + math.cos(math.pi * n / 8)) for n in range(9)])
    stable = shares(schedule="warmup_stable_decay", warmup_ratio=0.2, min_lr_ratio=0.1, decay_ratio=0.4)
    fall = [0.1 + 0.45 * (1 + math.cos(math.pi * n / 4)) for n in range(5)]
    assert stable == pytest.approx([0.1, 0.55, 1, 1, 1, 1, *fall])
    assert shares(schedule="warmup_stable_decay", warmup_ratio=0, decay_ratio=0.99)[0] == 1  # of 10 steps, all decay


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "linear", "min_lr_ratio": 0.1}, "train.min_lr_ratio=0.1: train.schedule=linear has no use"),
        ({"decay_ratio": 0.2}, "train.decay_ratio=0.2: train.schedule=cosine has no use for it"),
        ({"schedule": "constant", "warmup_ratio": 0.1}, "constant has no use for it.* or constant_with_warmup or"),
        ({"schedule": "cosine_with_min_lr"}, "ends at train.min_lr_ratio"),
        ({"schedule": "warmup_stable_decay", "warmup_ratio": 0.6, "decay_ratio": 0.5}, "are more than all steps"),
    ],
)
def test_a_setting_that_a_schedule_does_not_use_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**settings)


def test_a_run_of_an_earlier_version_goes_on_with_its_schedule():
    saved = asdict(RunConfig())
    del saved["train"]["schedule"]
    assert differences(RunConfig(), saved) == {}
    linear = RunConfig(train=TrainConfig(schedule="linear"))
    assert differences(linear, saved) == {"train.schedule": ("cosine", "linear")}


@pytest.mark.slow
def test_a_run_starts_without_the_libraries_that_it_does_not_use():
    """peft and bitsandbytes take seconds to import, and start CUDA."""
    unused = "peft", "bitsandbytes", "matplotlib"
    code = f"import sys, sorsa_ds.train.setup; print([name for name in {unused} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def _compiler_after_a_step(folder):
    """Whether PyTorch's compiler was imported on the way to an engine's first step."""
    engine = build(folder, ds_config(2, "", 0.0, 1), CASES[0])
    engine.train_step(micro_losses(engine, sequences(MICRO), 1))
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.slow
def test_an_engine_is_made_without_pytorchs_compiler(tiny_llama):
    assert run_ranks(1, _compiler_after_a_step, tiny_llama, start="spawn") == [False]
