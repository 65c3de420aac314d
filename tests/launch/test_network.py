"""No command reaches beyond this machine, unless a name on the hub, wandb or publishing asks for it."""

import json
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
"""What Python runs at the start of every process here: it notes each host that is looked up or connected to."""

COMMANDS = """
import importlib
import json
import os
import sys

from sorsa_ds.runtime import exit_codes


def run_all():
    import sorsa_ds.evaluate.command, sorsa_ds.export.command, sorsa_ds.plan.command, sorsa_ds.train.setup

    for name, words in json.loads(sys.argv[1]):
        if (child := os.fork()) == 0:
            importlib.import_module(f"sorsa_ds.cli.{name}").main(words)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, f"{name} {words}: exit code {code}"


exit_codes.run(run_all)  # as every command begins
"""
"""Several commands, one after the other, in a process that has imported once what they need; it is watched too."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Runs Python with some words, and gives its outcome and the hosts that it or a child has reached."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)
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


def test_commands_on_what_lies_here_reach_nobody(watched, project, tmp_path):
    data, folder = gsm8k(tmp_path / "gsm8k"), tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((project / "data.jsonl").read_bytes())
    stage0 = ["--ds_config", "ds_configs/stage0.json"]
    run, model = project / "quiet", project / "model"
    commands = [
        ("train", [*stage0, *settings(project, "quiet"), "train.steps=2", "output.save_every=1", "analysis.every=1"]),
        ("train", [*stage0, *settings(project, "noted"), f"data.path={folder}", "output.wandb=offline"]),
        ("evaluate", ["--model", run, "--task", "loss"]),
        ("evaluate", ["--model", model, "--task", "gsm8k", "--data", data, "--max_new_tokens", 2,
                      "--output", tmp_path / "gsm8k-of-model"]),
        ("export", ["--run", run, "--format", "merged", "--output", tmp_path / "merged"]),
        ("export", ["--run", run, "--format", "lora", "--output", tmp_path / "lora"]),
        ("evaluate", ["--model", tmp_path / "lora", "--task", "loss", "--data", project / "data.jsonl",
                      "--output", tmp_path / "loss-of-lora"]),
        ("analyze", ["--run", run, "--output", tmp_path / "analysis", "--workers", 1]),
        ("plan", [f"model={model}", "adapter.rank=4"]),
    ]  # fmt: skip
    done, reached = watched("-c", COMMANDS, json.dumps([(name, list(map(str, words))) for name, words in commands]))
    assert done.returncode == 0, done.stderr[-4000:]
    assert reached == ""
    assert list((project / "noted" / "wandb").glob("offline-run-*"))


def test_the_hook_sees_who_is_asked(watched):
    program = "import socket\ntry: socket.create_connection(('nowhere.invalid', 1))\nexcept OSError: pass"
    done, reached = watched("-c", program)
    assert (done.returncode, reached) == (0, "socket.getaddrinfo nowhere.invalid\n")


def test_a_name_on_the_hub_is_asked_for_once(watched):
    done, reached = watched("launch/plan.py", "model=nobody/nothing")
    assert done.returncode == 2
    assert len(reached.splitlines()) <= 1, "it is asked again and again"
