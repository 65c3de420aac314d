"""No command reaches beyond this machine, unless a name on the hub, wandb or publishing asks for it."""

import os
import subprocess
import sys

import pytest

from tests.helpers.projects import ROOT, settings
from tests.helpers.small_data import gsm8k

pytestmark = pytest.mark.slow

HOOK = """
import os
import sys

LOCAL = (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::")


def audit(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL:
        log = os.open(os.environ["REACHED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{event} {host}\\n".encode())
        os.close(log)


sys.addaudithook(audit)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command of launch/ in a process that notes every host which it, or a child, looks up or connects to."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)  # Python runs it at its start
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))},
        "PYTHONPATH": f"{folder}:{ROOT}", "REACHED": str(folder / "reached"), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"),
    }  # fmt: skip

    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, text=True, capture_output=True, env=environment
        )
        reached = folder / "reached"
        found = reached.read_text() if reached.exists() else ""
        reached.unlink(missing_ok=True)
        return done, found

    return run


@pytest.fixture(scope="module")
def run(project, command):
    """A run, trained by the command."""
    words = [*settings(project, "quiet"), "train.steps=2", "output.save_every=1", "analysis.every=1"]
    done, reached = command("launch/train.py", "--ds_config", "ds_configs/stage0.json", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert reached == ""
    return project / "quiet"


def test_the_hook_sees_who_is_asked(command):
    done, reached = command(
        "-c", "import socket\ntry: socket.create_connection(('nowhere.invalid', 1))\nexcept OSError: 0"
    )
    assert (done.returncode, reached) == (0, "socket.getaddrinfo nowhere.invalid\n")


def test_training_a_folder_and_resuming(run, command, project):
    (project / "folder").mkdir(exist_ok=True)
    (project / "folder" / "train.jsonl").write_bytes((project / "data.jsonl").read_bytes())
    words = [*settings(project, "of-a-folder"), f"data.path={project / 'folder'}", "train.steps=1"]
    done, reached = command("launch/train.py", "--ds_config", "ds_configs/stage0.json", *words)
    assert (done.returncode, reached) == (0, ""), done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["run", "model"])
def test_evaluating(run, command, project, tmp_path, kind):
    data = gsm8k(tmp_path / "gsm8k")
    words = {
        "run": ["--model", run, "--task", "loss"],
        "model": ["--model", project / "model", "--task", "gsm8k", "--data", data, "--max_new_tokens", 2,
                  "--output", tmp_path / "out"],
    }  # fmt: skip
    done, reached = command("launch/evaluate.py", *words[kind])
    assert (done.returncode, reached) == (0, ""), done.stderr[-3000:]


@pytest.mark.parametrize("form", ["merged", "lora"])
def test_exporting(run, command, tmp_path, form):
    done, reached = command("launch/export.py", "--run", run, "--format", form, "--output", tmp_path / "out")
    assert (done.returncode, reached) == (0, ""), done.stderr[-3000:]


def test_planning_and_analysing(run, command, project, tmp_path):
    done, reached = command("launch/plan.py", f"model={project / 'model'}", "sorsa.rank=4")
    assert (done.returncode, reached) == (0, ""), done.stderr[-3000:]
    done, reached = command("launch/analyze.py", "--run", run, "--output", tmp_path / "out", "--workers", 1)
    assert (done.returncode, reached) == (0, ""), done.stderr[-3000:]


def test_wandb_offline(command, project):
    words = [*settings(project, "noted"), "train.steps=1", "output.wandb=offline"]
    done, reached = command("launch/train.py", "--ds_config", "ds_configs/stage0.json", *words)
    assert (done.returncode, reached) == (0, ""), done.stderr[-3000:]
    assert list((project / "noted" / "wandb").glob("offline-run-*"))


def test_a_name_on_the_hub_asks_for_the_network(command):
    done, reached = command("launch/plan.py", "model=nobody/nothing")
    assert done.returncode == 2
    assert set(reached.splitlines()) <= {"socket.getaddrinfo huggingface.co"}
    assert len(reached.splitlines()) <= 1, "it is asked once, not again and again"
