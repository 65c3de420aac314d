"""Long work that one rank does for others: no collective waits for it, and nobody waits for a rank that is gone."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sorsa_ds.runtime import collectives, waiting
from sorsa_ds.runtime.errors import PeerError
from tests.helpers.worlds import run_ranks


def _slowly(seconds: float) -> str:
    time.sleep(seconds)
    return f"by {collectives.rank()}"


def _refusal(call) -> str:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _broken() -> None:
    raise ValueError("no such model")


def _all_that_there_is() -> dict:
    """Everything in one world, whose collectives may take one second."""
    rank = collectives.rank()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    waiting.BEAT_SECONDS, waiting.TELL_SECONDS = 0.2, 1.0
    found = {"job": waiting.first_of_job(lambda: _slowly(2.5), "sleeping")}
    dist.barrier()
    os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"] = str(rank // 2), str(rank % 2)
    found["node"] = waiting.first_of_node(lambda: _slowly(0.1), "sleeping")
    found["error"] = _refusal(lambda: waiting.first_of_job(_broken, "looking"))
    waiting.BEAT_SECONDS, waiting.SILENT_SECONDS = 60.0, 0.5
    found["silent"] = _refusal(lambda: waiting.first_of_job(lambda: _slowly(2), "sleeping"))
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=1))  # the end of the world is a collective too
    return found


@pytest.mark.slow
def test_ranks_wait_for_one_longer_than_a_collective_may_take(capfd):
    first, second, third, fourth = run_ranks(4, _all_that_there_is)
    assert {one["job"] for one in (first, second, third, fourth)} == {"by 0"}
    assert [one["node"] for one in (first, second, third, fourth)] == ["by 0", "by 0", "by 2", "by 2"]
    assert first["error"] == "ValueError: no such model"
    for one in (second, third, fourth):
        assert one["error"] == "PeerError: stopped because another rank failed: ValueError: no such model"
        assert one["silent"] == (
            "PeerError: stopped because the rank that was sleeping has shown no sign of life for 0 s"
        )
    assert "still sleeping: 0:00:0" in capfd.readouterr().out


def _in_a_collective() -> str:
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    if collectives.rank() == 0:
        time.sleep(2.5)
    return _refusal(lambda: dist.all_reduce(torch.ones(1), group=impatient))


@pytest.mark.slow
def test_a_collective_would_not_have_waited():
    assert "imed out" in str(run_ranks(2, _in_a_collective)[1])


def test_alone_there_is_nobody_to_wait_for():
    assert waiting.first_of_job(lambda: 3, "counting") == waiting.first_of_node(lambda: 3, "counting") == 3
    with pytest.raises(ValueError, match="no such model"):
        waiting.first_of_job(_broken, "looking")
    assert issubclass(PeerError, RuntimeError)
