"""Experts that a model holds as one parameter, in the engine: the same numbers as plain torch on every ZeRO stage."""

from dataclasses import replace

import pytest

from tests.helpers.engines import CASES, SORSA, build, compare, ds_config, ten_steps
from tests.helpers.expert_models import save_experts
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

RUNS = [(stage, case) for stage in (0, 1, 2, 3) for case in CASES]
ONE_OF_EACH = [(stage, CASES[stage % 2]) for stage in (0, 1, 2, 3)]


def train_with_engine(folder, runs, adapter=SORSA):
    """Train in every setting in this world; returns start, end and log of each on rank 0."""
    from sorsa_ds.runtime import collectives

    results = [
        ten_steps(build(folder, ds_config(stage, "", case["clip"], case["accumulation"]), case, adapter=adapter), case)
        for stage, case in runs
    ]
    return results if collectives.rank() == 0 else None


def train_experts_alone(folder, runs):
    """Nothing before the first experts is trained: under ZeRO-3 their inputs would need no gradient."""
    return train_with_engine(folder, runs, replace(SORSA, targets=["*.experts.*"]))


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_experts_alone_are_trained_under_zero3(tmp_path, name):
    """DeepSpeed gathers the whole block of Mixtral at once, and reduces its gradients when its inputs have theirs."""
    folder = save_experts(name, tmp_path / "model")
    [(start, end, log)] = run_ranks(2, train_experts_alone, folder, [(3, CASES[0])])[0]
    assert all("experts" in one for one in start)
    compare(folder, 2, CASES[0], start, end, log, tolerance=1e-5)


@pytest.mark.parametrize(("name", "world"), [("mixtral", 1), ("mixtral", 3), ("gpt_oss", 2)])
def test_ten_steps_equal_plain_torch(tmp_path, name, world):
    folder = save_experts(name, tmp_path / "model")
    runs = ONE_OF_EACH if world == 3 else RUNS
    results = run_ranks(world, train_with_engine, folder, runs)[0]
    for (stage, case), (start, end, log) in zip(runs, results, strict=True):
        assert any(value.dim() == 3 for value in start.values())
        try:
            compare(folder, world, case, start, end, log, tolerance=1e-5)
        except AssertionError as error:
            raise AssertionError(f"stage {stage}, {case}: {error}") from error
