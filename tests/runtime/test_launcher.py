"""The commands that messages show, in the words in which the job was started."""

import shlex
import sys
from types import SimpleNamespace

import pytest

from sorsa_ds.runtime import launcher

SCRIPT = "my launch/train.py"


@pytest.fixture
def started(monkeypatch):
    """Lets this process be a rank of a job, below processes with these command lines, the nearest first."""

    def start(*command_lines: list[str], **environment: str) -> None:
        above = [SimpleNamespace(cmdline=lambda words=words: words) for words in command_lines]
        monkeypatch.setattr(launcher.psutil, "Process", lambda: SimpleNamespace(parents=lambda: above))
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--local_rank=1", "output.name=a b", "--ds_config", "x.json"])
        monkeypatch.delenv(launcher.COMMAND, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    launcher._begin.cache_clear()
    yield start
    launcher._begin.cache_clear()


INNER = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=abc", SCRIPT, "output.name=a b"]
SHELL = ["bash", "start.sh"]


@pytest.mark.parametrize(
    ("above", "begin"),
    [
        ([SHELL], "python 'my launch/train.py'"),
        ([INNER, ["python", "/env/bin/deepspeed", "--num_gpus", "2", SCRIPT, "output.name=a b"], SHELL],
         "deepspeed --num_gpus 2 'my launch/train.py'"),
        ([INNER, ["sshd"]], "deepspeed 'my launch/train.py'"),
        ([["python", "/env/bin/torchrun", "--nproc_per_node", "2", SCRIPT]],
         "torchrun --nproc_per_node 2 'my launch/train.py'"),
        ([["python3", "-m", "torch.distributed.run", "--standalone", SCRIPT]],
         "python -m torch.distributed.run --standalone 'my launch/train.py'"),
        ([SHELL, ["python", "/env/bin/deepspeed", SCRIPT]], "python 'my launch/train.py'"),
    ],
)  # fmt: skip
def test_a_command_begins_as_the_job_did(started, above, begin):
    started(*above)
    assert launcher.command("--resume", "a run") == f"{begin} --resume 'a run'"


def test_a_script_says_itself_how_it_was_called(started):
    started(INNER, **{launcher.COMMAND: "launch/multi_gpu.sh --ranks 2"})
    assert launcher.command("--resume", "a run") == "launch/multi_gpu.sh --ranks 2 --resume 'a run'"


def test_the_same_command_has_the_same_settings_but_for_one(started):
    started()
    assert shlex.split(launcher.begin_again()) == [
        "python", SCRIPT, "output.name=a b", "--ds_config", "x.json", "--resume", "auto"
    ]  # fmt: skip
    other = launcher.same_command("output.name=c", without="output.name")
    assert shlex.split(other) == ["python", SCRIPT, "--ds_config", "x.json", "output.name=c"]
    sys.argv.append("--resume=auto")
    assert launcher.begin_again().count("--resume") == 1


def test_a_command_beside_the_script(started):
    started()
    assert launcher.beside("python", "evaluate.py", "--model", "a b") == "python 'my launch/evaluate.py' --model 'a b'"
