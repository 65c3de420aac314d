"""How a rank meets the others: no port for a world of one, and the true reason where it cannot."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from sorsa_ds.runtime import process
from sorsa_ds.runtime.ports import free_port
from tests.helpers.projects import ROOT

ALONE = """
import json, os, psutil, torch
from sorsa_ds.runtime.process import init_distributed
init_distributed()
from deepspeed import comm
numbers = torch.ones(3)
comm.all_reduce(numbers, group=torch.distributed.new_group([0]))
listening = [c.laddr.port for c in psutil.Process().net_connections() if c.status == "LISTEN"]
store = torch.distributed.distributed_c10d._get_default_store()
while hasattr(store, "underlying_store"):
    store = store.underlying_store
print(json.dumps([comm.get_world_size(), numbers.tolist(), type(store).__name__, listening]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
def test_a_world_of_one_meets_at_no_port(launched):
    port = free_port()
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {name: value for name, value in os.environ.items() if name not in rank}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)} | (rank if launched else {})
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, text=True, capture_output=True, check=True, cwd=ROOT
    )
    world, numbers, store, listening = json.loads(done.stdout.splitlines()[-1])
    assert (world, numbers, store) == (1, [1, 1, 1], "HashStore")
    assert port not in listening


@pytest.fixture
def rank_0_of_2(monkeypatch):
    """The environment of a rank that meets another one; returns the port."""
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port)}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return port


def test_a_port_in_use_is_told_with_the_option_that_changes_it(rank_0_of_2):
    with socket.socket() as other:
        other.bind(("127.0.0.1", rank_0_of_2))
        other.listen()
        with pytest.raises(ValueError, match=rf"port {rank_0_of_2}, .* is in use .*--master_port PORT") as told:
            process.init_distributed(timedelta(seconds=30))
    assert "EADDRINUSE" in str(told.value)
    assert "firewall" not in str(told.value) and "within" not in str(told.value)


@pytest.mark.slow
def test_a_rank_that_waits_in_vain_says_how_many_came(rank_0_of_2):
    with pytest.raises(ValueError, match=rf"1 of 2 ranks came to 127.0.0.1:{rank_0_of_2}, within 1 s .*firewall"):
        process.init_distributed(timedelta(seconds=1))


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1"),
        torch.distributed.DistNetworkError("Connection reset by peer"),
        torch.distributed.DistStoreError("the store is upside down"),
        RuntimeError("Unable to find address for: eth9"),
    ],
)
def test_other_errors_keep_their_own_text(rank_0_of_2, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    with pytest.raises(ValueError, match=f"rank 0 of 2 cannot join the others at .*: {error}") as told:
        process.init_distributed()
    assert "firewall" not in str(told.value) and "within" not in str(told.value)


SEEN = """
import torch, deepspeed
from sorsa_ds.runtime import process
asked = []
made = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda *a, **k: asked.append(k) or made(*a, **k)
process.init_distributed()
print(len(asked), "device_id" in asked[0])
"""


@pytest.mark.slow
def test_the_library_of_the_gpus_does_not_connect_before_the_preflight():
    """With `device_id` NCCL connects in init_process_group, where no rank can tell the others what is wrong."""
    done = subprocess.run(
        [sys.executable, "-c", SEEN], text=True, capture_output=True, check=True, cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "1 False"
