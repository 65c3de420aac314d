"""Which rank this process is, by the variables of whatever has started it.

DeepSpeed's launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
Slurm's srun, Open MPI's and MVAPICH2's mpirun and MPICH's or Intel's mpiexec number their processes by other names,
which are translated here. Without that, each of these processes would take itself for a run of its own, all on the
first GPU.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

RUN = "launch/multi_gpu.sh, launch/multi_node.sh or launch/slurm/train.sbatch"


@dataclass(frozen=True, slots=True)
class Place:
    """One process of a job.

    rank, world_size: the process's number among all processes, and how many there are.
    local_rank, local_world_size: the process's number on its node, and how many processes are there.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True, slots=True)
class _Names:
    """The variables in which a launcher tells a process its place."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_LAUNCHERS = (
    _Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    _Names("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
           "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Names("mpirun of MVAPICH2", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
           "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Names("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip


def is_rank() -> bool:
    """Whether a launcher has started this process as one of several ranks, so that none is to be started above it."""
    return "RANK" in os.environ or _launcher() is not None


def check_tasks(otherwise: str, way_on: str) -> None:
    """Stop where Slurm gives the job several tasks, and this process is none of them.

    Args:
        otherwise: what the process would do, for the message. way_on: what may be meant, for the end of the message.

    Raises:
        ValueError: Slurm gives the job several tasks.
    """
    if (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
        raise ValueError(
            f"Slurm gives this job {tasks} tasks, and this process was started without srun or another launcher: "
            f"{otherwise}. Start it with {RUN} (docs/launching.md), or put srun before the command; {way_on}"
        )


def _launcher() -> _Names | None:
    """The launcher with names of its own that has started this process with others; None where there is none."""
    return next((names for names in _LAUNCHERS if os.environ.get(names.world_size, "1") != "1"), None)


def take_place() -> None:
    """Set RANK and the variables that go with it, unless the launcher has: from another launcher's, or as one alone.

    Raises:
        ValueError: there are to be several processes, but what they need to find each other is missing.
    """
    if "RANK" in os.environ:
        if not _is_number(os.environ["RANK"]):
            raise ValueError(
                f"RANK={os.environ['RANK']} is no number of a process: unset it, or start the run with {RUN}"
            )
        return
    if (names := _launcher()) is not None:
        place = _place(names, os.environ)
        address, port = _master(names, place, os.environ)
        os.environ.update(
            RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank),
            LOCAL_WORLD_SIZE=str(place.local_world_size), MASTER_ADDR=address, MASTER_PORT=port,
        )  # fmt: skip
        return
    check_tasks("it would train alone", "a run of one process needs --ntasks=1, or SLURM_NTASKS unset")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _place(names: _Names, told: Mapping[str, str]) -> Place:
    numbers = (names.rank, names.local_rank, names.world_size)
    missing = [name for name in numbers if not _is_number(told.get(name, ""))]
    if missing:
        raise ValueError(
            f"{names.world_size}={told[names.world_size]} says that {names.launcher} has started several processes, "
            f"but {' and '.join(missing)} is no number, so that none knows which it is: start them with {RUN}"
        )
    local = told.get(names.local_world_size, told[names.world_size])
    here = _tasks_here(names.local_world_size, local, told.get("SLURM_NODEID", "0"))
    return Place(int(told[names.rank]), int(told[names.world_size]), int(told[names.local_rank]), here)


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _tasks_here(name: str, text: str, node: str) -> int:
    """The number of tasks on a node, from Slurm's list for all nodes (`8(x2),4`) or from one number.

    Args:
        name: the name of the variable that holds the list, for the message.
        text: the list, or one number.
        node: the number of the node.
    """
    part = r"[0-9]{1,9}(?:\(x[0-9]{1,6}\))?"
    if not re.fullmatch(rf"{part}(?:,{part})*", text) or not _is_number(node):
        raise ValueError(
            f"{name}={text} does not say how many processes are on node {node} (SLURM_NODEID): start them with {RUN}"
        )
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(count)] * int(times or 1)
    return tasks[int(node)] if int(node) < len(tasks) else tasks[-1]


def _master(names: _Names, place: Place, told: Mapping[str, str]) -> tuple[str, str]:
    """The address and port at which the ranks meet."""
    number = told.get("SLURM_JOB_ID", "0")
    port = told.get("MASTER_PORT", str(20000 + int(number) % 20000) if number.isdigit() and number != "0" else "29500")
    if "MASTER_ADDR" in told:
        return told["MASTER_ADDR"], port
    if place.local_world_size == place.world_size:
        return "127.0.0.1", port
    nodes = told.get("SLURM_STEP_NODELIST", told.get("SLURM_JOB_NODELIST", ""))
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return done.stdout.split()[0], port
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ValueError(
            f"{names.launcher} has started {place.world_size} processes on several nodes, and none knows where rank 0 "
            f"is: set MASTER_ADDR to the first node's address for all of them, or start them with {RUN}"
        ) from None
