"""What preflight finds, by node; and on real ranks, that one node's fault ends all of them with the same message."""

import re
import time
from dataclasses import replace

import pytest

from sorsa_ds.runtime.memory import free_memory
from sorsa_ds.train.options import parse
from sorsa_ds.train.preflight.faults import GIB, faults, rank_map
from sorsa_ds.train.preflight.rank_facts import RankFacts
from tests.helpers.projects import settings
from tests.helpers.worlds import run_ranks

SAID = {"adapter.rank": 16, "DeepSpeed JSON: zero_optimization.stage": 3, "command line": "train.py adapter.rank=16"}


def facts(rank: int, **others) -> RankFacts:
    """The facts of one of four ranks on GPUs, two per node."""
    node, local_rank = f"gpu-{'ab'[rank // 2]}", rank % 2
    healthy = RankFacts(
        rank=rank,
        local_rank=local_rank,
        node=node,
        launcher=rank // 2,
        device="NVIDIA H100",
        device_id=f"uuid-{rank}",
        gpus=2,
        versions={"python": "3.11.2", "torch": "2.13.0"},
        said=SAID if local_rank == 0 else {},
        memory=64 * GIB,
        disks={"run folder (/runs)": 9 * GIB, "cache (/cache)": 5 * GIB},
    )
    return replace(healthy, **others)


def job(**changed) -> list[RankFacts]:
    """All four ranks; the last node's have what is `changed`."""
    return [facts(0), facts(1), facts(2, **changed), facts(3, **changed)]


def test_a_job_without_faults_has_its_ranks_on_one_line_a_node():
    assert faults(job()) == []
    assert rank_map(job()).splitlines() == [
        "4 ranks on 2 nodes",
        "  gpu-a  ranks 0-1, 2 x NVIDIA H100; free: 64.0 GiB memory, 5.0 GiB disk",
        "  gpu-b  ranks 2-3, 2 x NVIDIA H100; free: 64.0 GiB memory, 5.0 GiB disk",
    ]


def test_two_launchers_on_one_host_are_two_nodes():
    both = [facts(0), facts(2, node="gpu-a")]
    assert rank_map(both).count("gpu-a  rank ") == 2
    assert faults(both) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"versions": {"python": "3.11.2", "torch": "2.12.0"}}, "torch is 2.12.0, on gpu-a 2.13.0"),
        ({"said": {**SAID, "adapter.rank": 8}}, "adapter.rank is 8, on gpu-a 16"),
        (
            {"said": {**SAID, "DeepSpeed JSON: zero_optimization.stage": 2}},
            "DeepSpeed JSON: zero_optimization.stage is 2, on gpu-a 3",
        ),
        (
            {"said": {**SAID, "command line": "train.py --resume auto"}},
            "command line is 'train.py --resume auto', on gpu-a 'train.py adapter.rank=16'",
        ),
        (
            {"said": {**SAID, "adapter.rank": 8, "command line": "train.py adapter.rank=8"}},
            "adapter.rank is 8, on gpu-a 16",
        ),
        ({"said": {**SAID, "extra": 1}}, "extra is 1, on gpu-a None"),
        ({"memory": GIB // 2}, "only 0.5 GiB of memory are free for 2 ranks"),
        ({"disks": {"cache (/cache)": GIB // 10}}, "only 0.1 GiB are free on the disk of the cache (/cache)"),
        ({"gpus": 0, "device": "CPU", "device_id": ""}, "0 GPUs are visible, on gpu-a 2"),
    ],
)
def test_each_fault_is_told_once_with_its_node(changed, fault):
    assert faults(job(**changed)) == [f"node gpu-b (ranks 2-3): {fault}"]


def test_gpus_are_held_against_local_ranks():
    lacking = [facts(0), facts(1), facts(2, gpus=1), facts(3, gpus=1, device="no GPU", device_id="")]
    assert faults(lacking) == ["node gpu-b (ranks 2-3): local rank 1 has no GPU, 1 are visible (CUDA_VISIBLE_DEVICES)"]
    shared = [facts(0), facts(1, device_id="uuid-0"), facts(2, device_id="uuid-0"), facts(3)]
    assert faults(shared) == ["node gpu-a: ranks 0 and 1 have the same GPU (uuid-0)"]


def test_all_faults_are_told_together():
    both = job(memory=0, said={**SAID, "adapter.rank": 8})
    assert len(faults(both)) == 2


def test_free_memory_is_no_more_than_the_machine_has():
    assert 0 < free_memory() < 2**50


def _check(arguments: list[str], nodes: list[str]) -> str:
    """Preflight on this rank, which says that it is on `nodes[rank]`; returns its error."""
    import os
    from datetime import timedelta

    import torch

    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.preflight.check import check_job

    rank = collectives.rank()
    own = os.uname()
    os.uname = lambda: os.uname_result((own.sysname, nodes[rank], *own[2:]))
    os.environ.update(LOCAL_RANK="0", CROSS_RANK=str(rank))
    given = [argument.replace("RANK", str(rank)) for argument in arguments]
    try:
        check_job(parse(given), {}, torch.device("cpu"), timedelta(seconds=60), given)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_real_ranks_agree(project):
    (project / "runs").mkdir(exist_ok=True)
    assert run_ranks(2, _check, [*settings(project, "x")], ["a", "b"]) == ["", ""]
    assert not list(project.glob(".preflight-*"))


@pytest.mark.slow
def test_one_nodes_fault_ends_all_ranks_with_the_same_message(project):
    told = run_ranks(2, _check, [*settings(project, "x"), "train.seed=RANK"], ["a", "b"])
    assert told[0] == told[1]
    assert told[0].startswith("preflight: nothing was started:\n  node b (rank 1): train.seed is 1, on a 0")


@pytest.mark.slow
def test_what_one_node_lacks_is_told_to_all_before_anything_is_read(project):
    told = run_ranks(2, _check_on_two_nodes, project)
    assert told[0] == told[1]
    assert re.search(r"nothing was started:\n  node b: data.path: no file or folder '/nowhere/1.jsonl' here", told[0])


def _check_on_two_nodes(project) -> str:
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "1"
    (project / "0.jsonl").write_bytes((project / "data.jsonl").read_bytes())
    place = {"0": str(project), "1": "/nowhere"}[os.environ["RANK"]]
    return _check([*settings(project, "x"), f"data.path={place}/RANK.jsonl"], ["a", "b"])


@pytest.mark.slow
def test_a_rank_that_cannot_tell_of_itself_ends_all_of_them(project):
    def gather(*_):
        raise PermissionError("the disk does not let itself be measured")

    told = run_ranks(2, _check_with, gather, [*settings(project, "x")])
    assert told[0] == told[1]
    assert told[0].endswith("\n  node b (rank 1): PermissionError: the disk does not let itself be measured")


def _check_with(gather, arguments: list[str]) -> str:
    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.preflight.check import check_job

    if collectives.rank() == 1:
        check_job.__globals__["gather_facts"] = gather
    return _check(arguments, ["a", "b"])


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_found(project, tmp_path, monkeypatch):
    """Rank 1 has another folder of that name: relative names, from another current folder."""
    told = run_ranks(2, _in_own_folder, tmp_path)
    assert told[0] == told[1]
    assert re.search(
        r"node b: output.folder \S+1/runs is not that of rank 0: all nodes need one shared folder", told[0]
    )


def _in_own_folder(tmp_path) -> str:
    import os

    from sorsa_ds.runtime import collectives

    own = tmp_path / str(collectives.rank())
    own.mkdir()
    os.chdir(own)
    return _check([], ["a", "b"])


NCCL_MEMORY = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"


def _with_broken_nccl(arguments: list[str]) -> str:
    """Rank 1's library refuses to connect, and rank 0's waits for it without end, as NCCL does."""
    import time

    import torch.distributed as dist

    from sorsa_ds.runtime import collectives

    def all_reduce(*_, **__):
        if collectives.rank() == 1:
            raise RuntimeError(NCCL_MEMORY)
        time.sleep(600)

    before, dist.all_reduce = dist.all_reduce, all_reduce
    try:
        return _check(arguments, ["a", "b"])
    finally:
        dist.all_reduce = before


@pytest.mark.slow
def test_what_nccl_says_on_one_rank_is_told_by_all_and_soon(project):
    (project / "runs").mkdir(exist_ok=True)
    began = time.monotonic()
    told = run_ranks(2, _with_broken_nccl, [*settings(project, "x")])
    assert time.monotonic() - began < 50  # the rank that waits would wait for 60 s, and longer
    assert told[0] == told[1]
    assert f"node b: an all-reduce over gloo fails ({NCCL_MEMORY})" in told[0] and "node a" not in told[0]
