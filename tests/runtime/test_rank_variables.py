"""Which rank a process is, under launchers that do not set RANK."""

import os

import pytest

from sorsa_ds.runtime.rank_variables import take_place

KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def started(monkeypatch):
    """started(NAME=value, ...): what `take_place` makes of an environment with these variables alone."""

    def start(**variables: str) -> dict[str, str]:
        for name in list(os.environ):
            if name in KEYS or name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_")):
                monkeypatch.delenv(name)
        for name in KEYS:  # so that what is set now is gone afterwards
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        take_place()
        return {name: os.environ[name] for name in KEYS if name in os.environ}

    return start


SRUN = {
    "SLURM_JOB_ID": "41", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


def test_alone_it_is_rank_0_of_1(started):
    assert started() == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def test_a_launcher_that_sets_rank_is_left_alone(started):
    assert started(RANK="3", **SRUN) == {"RANK": "3"}


def test_under_srun_tasks_are_ranks_that_meet_at_the_first_node(started, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert started(**SRUN) == {
        "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20041",
    }  # fmt: skip


@pytest.mark.parametrize(("node", "here"), [(0, "4"), (1, "4"), (2, "1")])
def test_nodes_may_have_different_numbers_of_tasks(started, node, here):
    told = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": str(node), "MASTER_ADDR": "10.0.0.1"}
    assert started(**told)["LOCAL_WORLD_SIZE"] == here


def test_without_slurms_tools_the_first_node_is_asked_for(started, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="srun has started 16 processes on several nodes.*set MASTER_ADDR"):
        started(**SRUN)


def test_on_one_node_nothing_is_asked(started, monkeypatch):
    monkeypatch.setenv("PATH", "")
    told = SRUN | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
    }
    assert started(**told | {"SLURM_NODEID": "0"})["MASTER_ADDR"] == "127.0.0.1"


def test_many_tasks_without_a_launcher_are_refused_with_the_command(started):
    with pytest.raises(ValueError, match=r"16 tasks.*would train alone.*launch/slurm/train\.sbatch.*srun before"):
        started(SLURM_NTASKS="16", SLURM_PROCID="0", SLURM_JOB_ID="41")


def test_mpirun_and_mpiexec_are_known(started):
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert started(**mpi, OMPI_COMM_WORLD_LOCAL_SIZE="2") == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }  # fmt: skip
    with pytest.raises(ValueError, match="mpirun has started 2 processes on several nodes.*set MASTER_ADDR"):
        started(**mpi, OMPI_COMM_WORLD_LOCAL_SIZE="1")
    hydra = started(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
    assert hydra["RANK"] == hydra["LOCAL_RANK"] == "1" and hydra["WORLD_SIZE"] == "2"


def test_mvapich_is_known(started):
    told = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "3"}
    assert started(**told, MV2_COMM_WORLD_LOCAL_SIZE="4")["RANK"] == "3"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "junk"}, "SLURM_STEP_TASKS_PER_NODE=junk does not say"),
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, "SLURM_STEP_TASKS_PER_NODE= does not say"),
        ({"SLURM_NODEID": "x"}, r"on node x \(SLURM_NODEID\)"),
        ({"SLURM_PROCID": "²"}, "SLURM_PROCID is no number"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is no number"),
        ({"RANK": "x"}, "RANK=x is no number of a process"),
    ],
)
def test_variables_that_make_no_sense_are_named(started, changed, named):
    with pytest.raises(ValueError, match=named):
        started(**SRUN | changed)


def test_a_launcher_that_tells_no_number_is_refused(started):
    with pytest.raises(ValueError, match="PMI_SIZE=4.*MPI_LOCALRANKID is no number"):
        started(PMI_SIZE="4", PMI_RANK="1")
