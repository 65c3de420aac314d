"""The log of a run: what cannot be logged is said by name and step."""

import pytest

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.log import RunLog
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.trackers import Trackers


@pytest.fixture
def log(tmp_path):
    config, none = RunConfig(), Trackers(tmp_path, RunConfig(), continues=False)
    return RunLog(
        folder=tmp_path, config=config, ds_config={}, given={}, initialised={}, steps_done=0, steps=9, trackers=none
    )


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_value_that_is_no_number_is_named_with_its_step(log, number):
    log.write(3, loss=1.5, reg_loss=None)
    with pytest.raises(ValueError) as caught:
        log.write(4, loss=1.5, tokens_per_second=number)
    wrong = f"step 4 is not logged: tokens_per_second is {number}, which JSON cannot hold"
    assert str(caught.value) == f"{log.folder / 'metrics.jsonl'}: {wrong}"
    assert read_metrics(log.folder) == [{"step": 3, "loss": 1.5}]


def test_lines_that_a_run_does_not_write_are_damage(log):
    for line, reason in (("[" * 100_000, "not JSON"), ('{"step": 1, "loss": NaN}', "not JSON"), ("[]", "has no step")):
        (log.folder / "metrics.jsonl").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=f"metrics.jsonl, line 1: {reason}"):
            read_metrics(log.folder)
