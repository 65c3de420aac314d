"""Real launchers, interrupted or killed: the run saves, its command fails, and the one that is printed goes on."""

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from sorsa_ds.runtime.launcher import is_launcher
from sorsa_ds.runtime.ports import free_port
from tests.helpers.jobs import SECONDS, Hold
from tests.helpers.projects import ROOT, STEPS, environment_of, metrics, settings

LAUNCHERS = {
    "multi_gpu.sh": ["bash", "launch/multi_gpu.sh", "--ranks", "2", "--port"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
    "torchrun": [
        "bash", "launch/multi_node.sh", "--hostfile", "HOSTS", "--node_rank", "0", "--master_addr", "127.0.0.1",
        "--torchrun", "--master_port",
    ],
}  # fmt: skip
"""Commands that train on two ranks, up to the port."""


class Held:
    """A run of two ranks that stand still before their third step, in a session of its own like that of a terminal."""

    def __init__(self, launcher: str, project: Path, folder: Path):
        (folder / "HOSTS").write_text("one slots=2\n")
        self.run = project / f"{folder.name} of {launcher}"  # a name that has to be quoted
        hold = Hold(folder, step=2)
        self.environment = environment_of(project, **hold.environment)
        words = [str(folder / word) if word == "HOSTS" else word for word in LAUNCHERS[launcher]]
        script = ["launch/train.py"] if launcher == "deepspeed" else []
        self.process = subprocess.Popen(
            [*words, str(free_port()), *script, *settings(project, self.run.name), "output.save_every=0"],
            cwd=ROOT, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        hold.wait(ranks=2)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str]:
        """Wait for the command and all of its processes; returns its exit code and everything printed."""
        code = self.process.wait(SECONDS)
        _, alive = psutil.wait_procs(self.family, SECONDS)
        assert not alive
        return code, self.process.stdout.read()


@pytest.fixture
def held(project, tmp_path):
    """Starts a run that stands still; whatever is left of it is killed."""
    started: list[Held] = []

    def start(launcher: str) -> Held:
        started.append(Held(launcher, project, tmp_path))
        return started[0]

    yield start
    for one in started:
        for process in [*one.family, one.process]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()


def way_on(printed: str, run: Held, signal_name: str) -> str:
    """The command in the one line that tells of the stop."""
    told = re.findall(rf"^{signal_name}: stopped after step 2 of {STEPS}; .*; to go on: (.*)$", printed, re.MULTILINE)
    assert len(told) == 1, printed[-3000:]
    assert (run.run / "checkpoints" / "latest").read_text() == "step-000002\n"
    assert not (run.run / "report.json").exists()
    return told[0]


def follow(command: str, run: Held) -> None:
    """Run a command, after which the run must be whole."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=run.environment, text=True, capture_output=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on after step 2" in done.stdout
    assert len(metrics(run.run, "loss")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("multi_gpu.sh", signal.SIGINT), ("torchrun", signal.SIGINT), ("multi_gpu.sh", signal.SIGTERM)],
)
def test_a_script_that_gets_a_signal_saves_and_the_printed_command_goes_on(held, launcher, number):
    """The ranks get SIGUSR1 from the script, and name what was sent to it."""
    run = held(launcher)
    os.killpg(run.process.pid, number)  # as a terminal sends Ctrl-C
    code, printed = run.end()
    assert code == 75, printed[-3000:]
    assert "Traceback" not in printed and "exit code 75" in printed
    command = way_on(printed, run, number.name)
    assert command.startswith(
        f"launch/{launcher} --ranks 2 " if launcher == "multi_gpu.sh" else "launch/multi_node.sh "
    )
    if launcher == "multi_gpu.sh" and number == signal.SIGINT:
        follow(command, run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["multi_gpu.sh"])
def test_a_run_whose_script_is_killed_saves_and_stops(held, launcher):
    """The launcher and its ranks are a process group of their own, which no signal to the script's group reaches."""
    run = held(launcher)
    os.killpg(run.process.pid, signal.SIGKILL)
    code, printed = run.end()
    assert code == -signal.SIGKILL
    way_on(printed, run, "SIGTERM")


@pytest.mark.slow
def test_ctrl_c_saves_under_deepspeeds_own_command_too(held):
    """Its launcher prints a traceback of its own, which the ranks cannot prevent."""
    run = held("deepspeed")
    os.killpg(run.process.pid, signal.SIGINT)
    code, printed = run.end()
    assert code != 0
    assert way_on(printed, run, "SIGINT").startswith("deepspeed --num_gpus 2 ")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["multi_gpu.sh", "deepspeed"])
def test_a_run_whose_inner_launcher_is_killed_saves_and_does_not_end_as_if_it_were_finished(held, launcher):
    run = held(launcher)
    [inner] = [process for process in run.family if "deepspeed.launcher.launch" in process.cmdline()]
    inner.kill()
    code, printed = run.end()
    assert code == (75 if launcher == "multi_gpu.sh" else -signal.SIGTERM), printed[-3000:]
    command = way_on(printed, run, "SIGTERM")
    if launcher == "deepspeed":
        follow(command, run)


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        (["python", "/bin/deepspeed", "--num_gpus", "2", "train.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"], True),
        (["python", "-m", "torch.distributed.run", "train.py"], True),
        (["/bin/python3", "/bin/torchrun", "train.py"], True),
        (["python", "mine.py", "deepspeed"], False),
        (["python", "-m", "mine", "-m", "torch.distributed.run"], False),
        (["bash", "-c", "deepspeed train.py"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_what_counts_as_a_launcher(words, launches):
    assert is_launcher(words) == launches
