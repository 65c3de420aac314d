"""What a failed rank is told to have failed of: itself, or another rank."""

import subprocess
import sys

import pytest
import torch

from sorsa_ds.runtime.errors import PeerError
from sorsa_ds.runtime.exit_codes import _is_consequence

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.29.3\n{}"


@pytest.mark.parametrize(
    "error",
    [
        PeerError("stopped because another rank failed: rank 1: no"),
        RuntimeError("[/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"),
        RuntimeError("Timed out waiting 600000ms for recv operation to complete"),
        RuntimeError("Application timeout caused pair closure"),
        torch.distributed.DistBackendError(
            NCCL.format("remote process exited or there was a network error", "ncclRemoteError: A call failed")
        ),
    ],
)
def test_another_ranks_failure_is_a_consequence(error):
    assert _is_consequence(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError(
            NCCL.format("unhandled cuda error", "ncclUnhandledCudaError: Last error:\nCuda failure 2 'out of memory'")
        ),
        torch.distributed.DistBackendError(
            NCCL.format("invalid usage", "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on 1000")
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        KeyError("nccl"),
    ],
)
def test_this_ranks_own_failure_is_none(error):
    assert not _is_consequence(error)


def test_a_command_has_room_on_pythons_stack():
    source = """
import sys
from sorsa_ds.runtime import exit_codes
exit_codes.run(lambda: print(sys._getframe(1).f_code.co_stacksize >= 2**16))
"""
    done = subprocess.run([sys.executable, "-c", source], text=True, capture_output=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OutOfMemoryError", "distributed.DistBackendError"])
def test_a_full_gpu_is_told_without_traceback_and_with_what_needs_less(kind):
    source = f"""
import torch
from sorsa_ds.runtime import exit_codes
def main():
    raise torch.{kind}("Cuda failure 2 'out of memory'")
exit_codes.run(main)
"""
    done = subprocess.run([sys.executable, "-c", source], text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "is out of memory (Cuda failure 2 'out of memory')" in done.stderr
    assert "train.micro_batch_size" in done.stderr and "Traceback" not in done.stderr
