"""The learning rate's schedule, against transformers'; and what a run starts without importing."""

import subprocess
import sys

import pytest
import torch

from sorsa_ds.engine.engine import cosine_with_warmup
from tests.helpers.engines import CASES, MICRO, build, ds_config, micro_losses, sequences
from tests.helpers.worlds import run_ranks


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (24, 1), (10, 9), (100, 3), (7, 0)])
def test_the_schedule_is_transformers_to_the_last_bit(steps, warmup):
    from transformers import get_cosine_schedule_with_warmup

    def rates(make) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
        schedule, found = make(optimizer), []
        for _ in range(steps + 2):
            found += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        return found

    assert rates(cosine_with_warmup(steps, warmup)) == rates(
        lambda optimizer: get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    )


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
