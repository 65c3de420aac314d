"""What CUDA and NCCL take of a GPU: as many communicators as there are process groups, in the plan of every job."""

import pytest

from sorsa_ds.plan import beside_tensors
from sorsa_ds.plan.beside_tensors import CONTEXT, LARGER, PAIR, PEER, communicators, nccl
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from tests.helpers.architectures import save
from tests.helpers.engines import CASES, build, ds_config
from tests.helpers.plans import job_of
from tests.helpers.worlds import run_ranks


@pytest.mark.parametrize(
    ("stage", "gpus", "nodes", "zero", "expected"),
    [
        (0, 1, 1, {}, 0),
        (3, 1, 1, {}, 0),
        (0, 2, 1, {}, 2 * PAIR),
        (2, 8, 1, {}, 2 * LARGER),
        (3, 8, 1, {}, 2 * LARGER + 7 * PEER),
        (3, 2, 4, {}, 2 * LARGER + PEER),
        (3, 2, 4, {"zero_hpz_partition_size": "auto"}, 2 * LARGER + PAIR + PEER),
        (3, 1, 4, {"zero_hpz_partition_size": "auto"}, 2 * LARGER),
    ],
)
def test_the_share_of_nccl_grows_with_groups_and_with_the_ranks_of_a_node(stage, gpus, nodes, zero, expected):
    assert nccl(job_of(stage, gpus=gpus, nodes=nodes, zero=zero)) == expected


def test_it_is_part_of_what_a_gpu_needs(tmp_path):
    folder, job = save("llama", tmp_path), job_of(3, gpus=2)
    needed = memory(job, facts(folder, job))
    assert (needed.gpu["context"], needed.gpu["communicators"]) == (CONTEXT, 2 * PAIR + PEER)
    assert needed.total == max(sum(needed.gpu.values()), needed.initialisation + CONTEXT + 2 * PAIR + PEER)


def test_what_is_there_before_anything_is_loaded_is_the_context_and_one_communicator():
    assert beside_tensors.at_the_start(job_of(3, gpus=1)) == CONTEXT
    assert beside_tensors.at_the_start(job_of(3, gpus=8)) == CONTEXT + LARGER


def _groups(folder, sizes):
    """The sizes of the process groups that this rank is in, in the order in which they were made."""
    import torch

    for size in sizes:
        ds = ds_config(3, "", 0.0, 1)
        ds["zero_optimization"] |= {} if size is None else {"zero_hpz_partition_size": size}
        build(folder, ds, CASES[0])
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [torch.distributed.get_world_size(group) for group in groups if torch.distributed.get_rank(group) >= 0]


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "nodes", "size"), [(2, 1, None), (2, 2, 2)])
def test_there_is_a_communicator_for_each_process_group(tmp_path, gpus, nodes, size):
    folder = save("llama", tmp_path)
    zero = {} if size is None else {"zero_hpz_partition_size": size}
    planned = communicators(job_of(3, gpus=gpus, nodes=nodes, zero=zero))
    for found in run_ranks(gpus * nodes, _groups, folder, [size]):
        assert sorted(found) == sorted(planned)
