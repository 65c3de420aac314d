"""What benchmarks/counts.py counts is what it promises, exactly, so that no slower way comes back unseen."""

import pytest
import torch

from benchmarks import counts
from benchmarks.helpers.common import write_small_llama
from benchmarks.helpers.cycles import cyclic_tensors
from benchmarks.helpers.host_syncs import HostSyncs
from benchmarks.helpers.kernels import Kernels, block_kernels, kept_ratio, linear_kernels
from benchmarks.helpers.padding import imbalance, like_metamath
from benchmarks.workers import counts as worker
from tests.helpers.worlds import run_ranks


def test_kernels_are_counted_without_views_and_allocations():
    x = torch.ones(4, 3)
    with Kernels() as counted:
        y = torch.empty(3, 3)
        torch.mm(x.t(), x.view(4, 3), out=y)
        y.add_(1)
    assert counted.counts == {"mm": 1, "add_": 1}


def test_kernels_of_a_linear_and_of_a_block():
    assert (linear_kernels("sorsa"), linear_kernels("lora")) == (14, 22)
    assert linear_kernels("sorsa", kept=False) == 19
    assert (block_kernels("sorsa"), block_kernels("sorsa", kept=False), block_kernels("lora")) == (182, 217, 238)


def test_a_linear_keeps_its_input_and_the_thin_product():
    assert kept_ratio() == 1


def test_a_llama_makes_no_mask_and_the_logits_of_a_chunk():
    assert counts.llama_mask_bytes() == 0
    assert counts.logit_ratio() == 8 / 12


def test_levelled_ranks_wait_for_less_than_three_percent():
    lengths = like_metamath(8192)
    assert imbalance(lengths, 8, 128, counts.POSITIONS) < 0.03
    assert imbalance(lengths, 8, 128, counts.POSITIONS, each_pass=False) < 0.003


def test_reading_a_whole_tensor_is_a_host_sync():
    with HostSyncs() as waited:
        torch.ones(3).tolist()
        torch.ones(1).item()
        assert torch.ones(3)[torch.tensor([True, False, True])].shape == (2,)
        torch.ones(3).numpy()
    assert waited.total == 3


@pytest.mark.slow
@pytest.mark.parametrize(("ds", "syncs"), [("stage0", 1), ("zero2", 3), ("zero3", 2)])
def test_host_syncs_of_a_step_do_not_grow_with_its_micro_batches(tmp_path, ds, syncs):
    write_small_llama(tmp_path / "model")
    for found in run_ranks(2, _step, ds, tmp_path):
        assert found["host_syncs"] == syncs, found["by"]
        assert found["blocking_signals"] == 0
        assert found["cyclic_tensors"] == 0


@pytest.mark.slow
def test_a_step_that_recomputes_its_blocks_leaves_no_tensor_to_the_collector_either(tmp_path):
    write_small_llama(tmp_path / "model")
    found = run_ranks(2, _step, "zero3", tmp_path, "train.gradient_checkpointing=true")
    assert [rank["cyclic_tensors"] for rank in found] == [0, 0]


def test_tensors_in_cycles_are_counted():
    def compute():
        torch.ones(2)
        cycle = [torch.ones(1), torch.ones(1)]
        cycle.append(cycle)

    assert cyclic_tensors(compute) == 2
    assert cyclic_tensors(lambda: torch.ones(2)) == 0


def _step(ds, folder, *settings):
    import argparse

    return worker.step(argparse.Namespace(ds_config=ds, folder=folder, settings=settings))
