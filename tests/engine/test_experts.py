"""Experts that a model holds as one parameter, in the engine: the same numbers as plain torch on every ZeRO stage."""

import pytest

from tests.helpers.engines import CASES, MICRO, STEPS, build, compare, ds_config, micro_losses, sequences, whole_factors
from tests.helpers.expert_models import save_experts
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

RUNS = [(stage, case) for stage in (0, 1, 2, 3) for case in CASES]


def train_with_engine(folder, runs):
    """Train in every setting in this world; returns start, end and log of each on rank 0."""
    from sorsa_ds.runtime import collectives

    results = []
    for stage, case in runs:
        engine = build(folder, ds_config(stage, "", case["clip"], case["accumulation"]), case)
        start, log = whole_factors(engine), []
        for t in range(STEPS):
            batch = sequences(MICRO * collectives.world_size() * case["accumulation"], seed=t)
            log.append(engine.train_step(micro_losses(engine, batch, case["accumulation"])))
        results.append((start, whole_factors(engine), log))
        engine.destroy()
    return results if collectives.rank() == 0 else None


@pytest.mark.parametrize(("name", "world"), [("mixtral", 1), ("mixtral", 3), ("gpt_oss", 2)])
def test_ten_steps_equal_plain_torch(tmp_path, name, world):
    folder = save_experts(name, tmp_path / "model")
    results = run_ranks(world, train_with_engine, folder, RUNS)[0]
    for (stage, case), (start, end, log) in zip(RUNS, results, strict=True):
        assert any(value.dim() == 3 for value in start.values())
        try:
            compare(folder, world, case, start, end, log, tolerance=1e-5)
        except AssertionError as error:
            raise AssertionError(f"stage {stage}, {case}: {error}") from error
