"""What may happen to a run while nobody kills its ranks, for benchmarks/faults.py; each says whether it survived."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import psutil

from benchmarks.helpers.victim import SECONDS, UNDISTURBED, Project, wait_for_all
from sorsa_ds.run.checkpoint import folder as checkpoints
from sorsa_ds.run.paths import CHECKPOINTS, METRICS

_STEPS = 3
"""Steps that a run makes before its mishap."""


def mishaps(project: Project) -> dict:
    """Let every mishap happen once; count them, and those that are told and after which the run ends undisturbed."""
    happening: dict[str, Callable[[Project], bool]] = {
        "launcher killed, deepspeed": launcher_killed,
        "launcher killed, launch/multi_gpu.sh": launcher_of_script_killed,
        "port in use": port_in_use,
        "folder renamed, name taken by another run": folder_renamed,
        "folder removed": folder_removed,
        "folder littered": folder_littered,
        "checkpoints cannot be written": checkpoints_unwritable,
        "log damaged": log_damaged,
    }
    survived = 0
    for what, happens in happening.items():
        try:
            well = happens(project)
        except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
            well = False
            print(f"{what}: {error}", flush=True)
        finally:
            project.end_all()
        survived += well
        print(f"{what}: {'told, survived' if well else 'MISSED'}", flush=True)
    return {"mishaps": len(happening), "survived": survived}


def launcher_killed(project: Project) -> bool:
    """DeepSpeed's inner process is killed: its command must not report success, and the ranks must save and leave."""
    return _kill_launcher(project, "orphaned", script=False) < 0


def launcher_of_script_killed(project: Project) -> bool:
    """The same under a script of launch/, which must pass on that the run is saved and to be continued."""
    return _kill_launcher(project, "orphaned-script", script=True) == 75


def _kill_launcher(project: Project, name: str, script: bool) -> int:
    """The exit code of the command whose inner launcher is killed; 0 where the run did not save itself or differs."""
    process = project.start(name, script)
    if not project.wait_for_step(name, process, _STEPS):
        return 0
    family = psutil.Process(process.pid).children(recursive=True)
    for child in family:
        if "deepspeed.launcher.launch" in child.cmdline():
            child.kill()
    code = process.wait(SECONDS)
    saved = wait_for_all(family) and _newest(project, name) == project.steps_of(name)
    project.train(name)
    return code if saved and project.same(name) and "SIGTERM: stopped after step" in project.told(name) else 0


def port_in_use(project: Project) -> bool:
    """Another program listens where the ranks are to meet: told at once, with the port and the option."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code = project.start("port", port=port).wait(SECONDS)
    told = project.told("port")
    project.train("port")
    found = f"port {port}" in told and "--master_port" in told and "firewall" not in told
    return code == 2 and found and project.same("port")


def folder_renamed(project: Project) -> bool:
    """A run's folder is renamed, and its name given to another run: the old one stops, and both end as they should."""
    name, moved = "taken", "taken-moved"
    old = project.start(name)
    if not project.wait_for_step(name, old, _STEPS):
        return False
    # The old one stands still, so that the new one is certain to have begun when it looks.
    family = [psutil.Process(old.pid), *psutil.Process(old.pid).children(recursive=True)]
    _signal(family, signal.SIGSTOP)
    (project.folder / name).rename(project.folder / moved)
    shutil.move(project.folder / f"{name}.log", project.folder / f"{moved}.log")
    new = project.start(name)
    begun = project.wait_for_step(name, new, _STEPS)
    _signal(family, signal.SIGCONT)
    codes = old.wait(SECONDS), new.wait(SECONDS)
    told = f"{project.folder / name} was renamed to {project.folder / moved}" in project.told(moved)
    project.train(moved)
    return begun and codes == (2, 0) and told and project.same(name) and project.same(moved)


def folder_removed(project: Project) -> bool:
    """A run's folder is removed: the run stops, and makes no folder anew."""
    name = "removed"
    process = project.start(name)
    if not project.wait_for_step(name, process, _STEPS):
        return False
    shutil.rmtree(project.folder / name, ignore_errors=True)  # it may be writing
    while (project.folder / name).exists():
        shutil.rmtree(project.folder / name, ignore_errors=True)
    code = process.wait(SECONDS)
    return code == 2 and "was removed while" in project.told(name) and not (project.folder / name).exists()


def folder_littered(project: Project) -> bool:
    """Files and links of others stand where a run might write: no save fails, and nothing behind a link changes."""
    name = "littered"
    beside = project.folder / name / CHECKPOINTS
    beside.mkdir(parents=True)
    (precious := project.folder / "precious").write_text("precious")
    (beside / ".step-000002.tmp").touch()
    (beside / ".step-000004.tmp").symlink_to(project.folder)
    (beside / ".latest.tmp").symlink_to(precious)
    project.train(name)
    told = project.told(name)
    return project.same(name) and "was not saved" not in told and precious.read_text() == "precious"


def checkpoints_unwritable(project: Project) -> bool:
    """No checkpoint can be written: told each time, the run trains on, ends with an error, and can be begun anew."""
    name = "unwritable"
    (project.folder / name).mkdir()
    (obstacle := project.folder / name / CHECKPOINTS).touch()
    code = project.start(name).wait(SECONDS)
    told = project.told(name)
    obstacle.unlink()
    project.train(name)
    return code == 2 and "the checkpoint of step 2 was not saved" in told and project.same(name)


def log_damaged(project: Project) -> bool:
    """A line of the log is no JSON: named with its number, and nothing is changed."""
    name = "unreadable"
    shutil.copytree(project.folder / UNDISTURBED, project.folder / name)
    (project.folder / name / "report.json").unlink()
    log = project.folder / name / METRICS
    log.write_bytes(damaged := b"\xff\n" + log.read_bytes())
    code = project.start(name).wait(SECONDS)
    return code == 2 and f"{log}, line 1" in project.told(name) and log.read_bytes() == damaged


def _newest(project: Project, name: str) -> int:
    return max(
        (checkpoints.step_of(path) for path in checkpoints.existing_checkpoints(project.folder / name)), default=0
    )


def _signal(family: list[psutil.Process], number: int) -> None:
    for process in family:
        process.send_signal(number)
    time.sleep(0.1)
