"""The shell scripts: their help, what they refuse before anything is started, and what they make of exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sorsa_ds.runtime.ports import free_port
from tests.helpers.projects import ROOT, settings

SCRIPTS = ("single_gpu.sh", "multi_gpu.sh", "multi_node.sh", "slurm/train.sbatch", "slurm/evaluate.sbatch")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTORCH_"))},
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
}  # fmt: skip


JOB = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sorsa", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "one",
    "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "2",
}  # fmt: skip
"""What Slurm tells a job."""


def run(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """A script of launch/ to its end, from whichever folder."""
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    options.setdefault("env", ENVIRONMENT)
    return subprocess.run(command, text=True, capture_output=True, timeout=240, check=False, **options)


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which programs of these names are these shell scripts."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {**ENVIRONMENT, "PATH": f"{folder}:{ENVIRONMENT['PATH']}"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs Debian's shellcheck")
def test_shellcheck_finds_nothing():
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "launch" / script).read_text()
    if script.startswith("slurm/"):
        text += (ROOT / "launch" / "slurm" / "job.sh").read_text()
    options = set(re.findall(r"^ +(--\w+)\)", text, re.MULTILINE))
    if script == "slurm/evaluate.sbatch":
        options.discard("--max_requeues")
    assert options and all(f"  {option} " in done.stdout for option in options), done.stdout
    assert done.stdout.startswith(("Train", "Evaluate"))
    assert "#" not in done.stdout.replace("   # the same", "")


def test_errors_command_no_terminal():
    done = run("single_gpu.sh", "--gpu", "\x1b[31m\x07one")
    assert (done.returncode, done.stderr) == (2, "error: --gpu is '?[31m?one': a whole number is needed\n")


def test_no_shell_variable_stands_in_an_sbatch_line():
    for script in SCRIPTS[3:]:
        lines = [line for line in (ROOT / "launch" / script).read_text().splitlines() if line.startswith("#SBATCH")]
        assert lines and not any("$" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("single_gpu.sh --gpu", "--gpu needs a value"),
        ("single_gpu.sh --gpu= adapter.rank=8", "--gpu needs a value"),
        ("single_gpu.sh --gpu one", "--gpu is 'one': a whole number is needed"),
        ("single_gpu.sh --gpu=one", "--gpu is 'one': a whole number is needed"),
        ("single_gpu.sh sorsa.rnk=3", "did you mean adapter.rank"),
        ("single_gpu.sh --resume nowhere", "--resume: there is no folder"),
        ("single_gpu.sh --resume=.", "is not the folder of a run"),
        ("multi_gpu.sh --ranks 0", "--ranks is 0: at least 1 is needed"),
        ("multi_gpu.sh --ranks=0", "--ranks is 0: at least 1 is needed"),
        ("multi_gpu.sh --ranks=08", "--ranks is '08': a whole number is needed"),
        ("multi_gpu.sh --ranks=a[$(id)]", "--ranks is 'a[$(id)]': a whole number is needed"),
        ("multi_gpu.sh --port 70000", "--port is 70000: at most 65535 is possible"),
        ("multi_gpu.sh --ranks 3 train.global_batch_size=4", "4 is not 3 ranks x a whole number"),
        ("multi_gpu.sh --config nowhere.yaml", "--config nowhere.yaml: no such file"),
        ("multi_node.sh adapter.rank=8", "--hostfile is missing"),
        ("multi_node.sh --nodes 2 --hostfile HOSTS", "--nodes and --hostfile say the same"),
        ("multi_node.sh --nodes 2", "--nodes needs --node_rank"),
        ("multi_node.sh --nodes 2 --node_rank 0", "--nodes needs --master_addr"),
        ("multi_node.sh --nodes 2 --node_rank 0 --master_addr a", "--ranks is missing"),
        ("multi_node.sh --nodes 2 --ranks 2 --node_rank 2 --master_addr a", "--nodes 2 names nodes 0 to 1"),
        ("multi_node.sh --hostfile HOSTS --ranks 2", "--ranks goes with --nodes"),
        ("multi_node.sh --hostfile nowhere", "--hostfile nowhere: no such file"),
        ("multi_node.sh --hostfile HOSTS", "does not name this node"),
        ("multi_node.sh --hostfile TWICE", "--hostfile TWICE names one twice"),
        ("multi_node.sh --hostfile HOSTS --node_rank 0 --master_port 99999", "--master_port is 99999: at most 65535"),
        ("multi_node.sh --hostfile HOSTS --node_rank 0 train.global_batch_size=8", "8 is not 6 ranks x a whole number"),
        ("multi_node.sh --hostfile HOSTS --node_rank 2", "--node_rank is 2: "),
        ("multi_node.sh --hostfile HOSTS --node_rank x", "--node_rank is 'x': a whole number is needed"),
        ("multi_node.sh --hostfile BAD --node_rank 0", "'one 4' does not read NAME slots=NUMBER"),
        ("multi_node.sh --hostfile HOSTS --node_rank 0 --torchrun", "--torchrun needs the same slots on every node"),
        ("multi_node.sh --hostfile HOSTS --node_rank 0 train.steps=0", "train.steps"),
        ("multi_node.sh --hostfile HOSTS --node_rank 0 --script nowhere.py", "--script nowhere.py: no such file"),
        ("slurm/train.sbatch --ranks_per_node none", "--ranks_per_node is 'none'"),
        ("slurm/train.sbatch --max_requeues -1", "--max_requeues is '-1'"),
        ("slurm/train.sbatch --max_requeues=-1", "--max_requeues is '-1'"),
        ("slurm/train.sbatch --nodes=2", "no GPUs are asked for"),
        ("slurm/train.sbatch --nodes=2-4 GPUS --", "--nodes is '2-4': a whole number is needed"),
        ("slurm/train.sbatch GPUS -- --master_port 99999999999999999999", "at most 65535 is possible"),
        ("slurm/train.sbatch GPUS -- --ds_config nowhere.json", "--ds_config nowhere.json: no such file"),
        ("slurm/train.sbatch GPUS -- --ds_config CUT.json", "CUT.json:2:1: not valid JSON"),
        (
            "slurm/train.sbatch GPUS -- --ds_config ODD.json",
            '"zero_optimisation" is not a key that this trainer passes on',
        ),
        ("slurm/train.sbatch GPUS -- --ds_config ODD_ZERO.json", '"zero_optimization.stgae" is not a key that this'),
        ("slurm/train.sbatch GPUS -- --resume nowhere", "--resume: there is no folder"),
        ("slurm/train.sbatch -N 3 GPUS -- train.global_batch_size=8", "8 is not 6 ranks x a whole number"),
        ("slurm/train.sbatch --gres=gpu:a100:3 -- train.global_batch_size=8", "8 is not 3 ranks x a whole number"),
        ("slurm/train.sbatch -N 2 --gpus=6 -- train.global_batch_size=8", "8 is not 6 ranks x a whole number"),
        ("slurm/train.sbatch -N2 -G a100:6 -- train.global_batch_size=8", "8 is not 6 ranks x a whole number"),
        ("slurm/train.sbatch -N 2 -G5 --", "--gpus 5 does not divide among 2 nodes: say --gpus-per-node=N"),
        ("slurm/evaluate.sbatch GPUS -- ", "arguments are required: --task, --model"),
        ("slurm/evaluate.sbatch GPUS -- --model m --task loss --bogus=3", "unrecognized arguments: --bogus=3"),
        ("slurm/evaluate.sbatch GPUS -- --model m --task loss --shots 3", "unrecognized arguments: --shots 3"),
        ("slurm/evaluate.sbatch GPUS -- --model m --task gsm8k --window 9", "--window goes with --task loss"),
        ("slurm/evaluate.sbatch GPUS -- --model /nowhere --task loss", "there is no folder '/nowhere'"),
        ("slurm/evaluate.sbatch GPUS -- --model RUN --task loss", "RUN is unfinished"),
        ("slurm/evaluate.sbatch GPUS --model m --task loss", "what is for sbatch stands before a `--`"),
    ],
)
def test_mistakes_end_with_one_message_before_anything_is_started(command, message, tmp_path):
    (tmp_path / "HOSTS").write_text("one.invalid slots=4\ntwo.invalid slots=2\n")
    (tmp_path / "TWICE").write_text("one slots=4\ntwo slots=4\none slots=2\n")
    (tmp_path / "BAD").write_text("one 4\n")
    (tmp_path / "CUT.json").write_text("{\n")
    (tmp_path / "ODD.json").write_text('{"zero_optimisation": {"stage": 3}}')
    (tmp_path / "ODD_ZERO.json").write_text('{"zero_optimization": {"stgae": 3}}')
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").touch()
    queued = programs(tmp_path, sbatch="touch queued")
    done = run(*command.replace("GPUS", "--gpus-per-node=2").split(), cwd=tmp_path, env=queued)
    assert not (tmp_path / "queued").exists()
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_a_job_is_queued_from_the_folder_in_which_its_arguments_were_checked(tmp_path):
    (tmp_path / "mine.yaml").write_text("adapter: {rank: 3}\n")
    environment = programs(tmp_path, sbatch='echo "$PWD $SORSA_REPOSITORY $*"')
    script = os.path.relpath(ROOT / "launch" / "slurm" / "train.sbatch", tmp_path)
    done = subprocess.run(
        ["bash", script, "--gpus-per-node=2", "--", "--torchrun", "--config", "mine.yaml"],
        cwd=tmp_path, env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    queued = f"--gpus-per-node=2 {ROOT}/launch/slurm/train.sbatch --torchrun --config mine.yaml"
    assert done.stdout == f"{tmp_path} {ROOT} {queued}\n"


@pytest.mark.slow
def test_a_job_that_cannot_be_queued_again_still_ends_with_the_code_of_its_ranks(tmp_path):
    environment = programs(tmp_path, srun="exit 75", scontrol="[[ $1 == show ]] && echo JobState=RUNNING NodeAddr=one")
    done = run("slurm/train.sbatch", "--logs", "logs", cwd=tmp_path, env={**environment, **JOB})
    assert done.returncode == 75, done.stderr
    assert "Slurm refuses to queue the job again" in done.stdout


CODES = [
    ("exit 0", 1),  # no rank has come to its end
    ("exit 9", 9),
    ("echo 0 >$SORSA_EXIT_FILE", 0),
    ("echo 0 >$SORSA_EXIT_FILE; exit 1", 0),  # the ranks had finished
    ("echo 75 >$SORSA_EXIT_FILE; exit 0", 75),
    ("echo 2 >$SORSA_EXIT_FILE; exit 1", 2),
    ("echo 08 >$SORSA_EXIT_FILE; exit 1", 8),
    ("echo 300 >$SORSA_EXIT_FILE; exit 0", 1),
    ("echo 'a[$(touch executed)]' >$SORSA_EXIT_FILE; exit 0", 1),
    ("echo '75 || $(touch executed)' >$SORSA_EXIT_FILE; exit 6", 6),
]
"""What a launcher does, and the exit code that follows."""


@pytest.mark.parametrize(("launcher", "code"), CODES)
@pytest.mark.parametrize("script", ["multi_gpu.sh", "single_gpu.sh"])
def test_the_exit_code_is_that_of_the_ranks_and_nothing_in_their_file_is_executed(tmp_path, script, launcher, code):
    python = f"[[ $1 == */check.py ]] || {{ {launcher}; }}"
    environment = programs(tmp_path, deepspeed=launcher, python=python)
    done = run(script, cwd=tmp_path, env=environment)
    assert done.returncode == code, done.stderr
    assert f"exit code {code} after" in done.stderr
    assert ("no rank has come to its end" in done.stderr) == ("exit 0" in launcher and code == 1)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("launcher", "code"), CODES)
def test_the_exit_code_of_a_job_is_that_of_the_ranks(tmp_path, launcher, code):
    answer = "if [[ $1 == show ]]; then echo NodeAddr=one; else touch queued; fi"
    environment = programs(tmp_path, srun=launcher, scontrol=answer, python="exit 0", deepspeed="exit 0")
    done = run("slurm/train.sbatch", "--logs", "logs", cwd=tmp_path, env={**environment, **JOB})
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("SLURM_JOB_ID", "a[$(touch executed)]"), ("SLURM_RESTART_COUNT", "a[$(touch executed)]")]
)
def test_what_slurm_says_is_no_command_either(tmp_path, name, value):
    environment = programs(tmp_path, srun="exit 0", scontrol="exit 0", python="exit 0", deepspeed="exit 0")
    done = run("slurm/train.sbatch", "--logs", "logs", cwd=tmp_path, env={**environment, **JOB, name: value})
    assert done.returncode == 2
    assert f"{name} is '{value}': a whole number is needed" in done.stderr
    assert not (tmp_path / "executed").exists()


def test_the_exit_file_of_an_earlier_run_does_not_count(tmp_path):
    (tmp_path / "code").write_text("0\n")
    environment = programs(tmp_path, deepspeed="exit 0", python="exit 0")
    done = run("multi_gpu.sh", cwd=tmp_path, env={**environment, "SORSA_EXIT_FILE": str(tmp_path / "code")})
    assert done.returncode == 1, done.stderr


def test_ranks_that_outlive_their_launcher_are_waited_for(tmp_path):
    """In a session of their own, as torchrun's are."""
    rank = "setsid bash -c 'sleep 1.5; echo 75 >$SORSA_EXIT_FILE' & kill -9 $$"
    environment = programs(tmp_path, deepspeed=rank, python="exit 0")
    done = run("multi_gpu.sh", cwd=tmp_path, env=environment)
    assert done.returncode == 75, done.stderr


def test_ctrl_c_asks_the_ranks_and_a_second_one_kills_them(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import signal, time\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGUSR1, lambda *_: Path('asked').touch())\n"
        "Path('started').touch()\ntime.sleep(60)\n"
    )
    environment = programs(tmp_path, deepspeed=f"setsid {sys.executable} -S rank.py & wait", python="exit 0")
    script = ["bash", str(ROOT / "launch" / "multi_gpu.sh")]
    process = subprocess.Popen(script, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE)
    for sign in ("started", "asked"):
        wait_for(tmp_path / sign)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "a second one kills them" in told and "exit code 137" in told


def test_the_code_is_the_childs_where_it_dies_while_its_signal_is_handled(tmp_path):
    slow = """eval "$(declare -f signal_processes | sed s/signal_processes/send/)"
        signal_processes() { send "$1"; sleep 1; }"""
    started = f"trap '' USR1; touch '{tmp_path}/started'; sleep 60"
    script = f'set -euo pipefail; repository={ROOT}; source {ROOT}/launch/common.sh; {slow}; run bash -c "$1"'
    process = subprocess.Popen(["bash", "-c", script, "script", started], text=True, stderr=subprocess.PIPE)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGINT)
    assert "a second one kills them" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL


def wait_for(path: Path) -> None:
    """Until a file is there."""
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visible", "ranks", "taken"),
    [("4,5,6,7", "2", "4,5 and"), ("4,5,6,7", None, "4,5,6,7 and"), (None, "2", " and --num_gpus 2")],
)
def test_ranks_are_taken_from_the_gpus_that_are_visible(tmp_path, visible, ranks, taken):
    environment = programs(
        tmp_path, deepspeed='echo "$CUDA_VISIBLE_DEVICES and ${@:5}"', **{"nvidia-smi": "printf 'GPU 0\nGPU 1\n'"}
    )
    words = ["--ranks", ranks] if ranks else []
    chosen = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        environment.pop(name, None)
    done = run("multi_gpu.sh", *words, cwd=tmp_path, env={**environment, **chosen})
    assert done.stdout.startswith(taken), done.stdout + done.stderr
    assert ("--num_gpus" in done.stdout) == (visible is None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "smi"),
    [
        ({"DS_ACCELERATOR": "cpu"}, "printf 'GPU 0\nGPU 1\n'"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "printf 'GPU 0\nGPU 1\n'"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "printf 'GPU 0\n'"),
        ({}, "echo 'NVIDIA-SMI has failed'; exit 9"),
    ],
)
def test_gpus_that_are_hidden_are_left_alone(tmp_path, given, smi):
    told = 'echo "$DS_ACCELERATOR<$CUDA_VISIBLE_DEVICES> ${@:5:2}"'
    environment = programs(tmp_path, deepspeed=told, **{"nvidia-smi": smi})
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        environment.pop(name, None)
    done = run("multi_gpu.sh", cwd=tmp_path, env={**environment, **given})
    assert done.stdout == "cpu<> --num_gpus 2\n", done.stdout + done.stderr


@pytest.mark.slow
def test_a_gpu_beside_the_visible_ones_is_refused(tmp_path):
    environment = programs(tmp_path, **{"nvidia-smi": "printf 'GPU 0\nGPU 1\n'"})
    done = run("single_gpu.sh", "--gpu", "1", cwd=tmp_path, env={**environment, "CUDA_VISIBLE_DEVICES": "4,15"})
    assert done.returncode == 2 and "--gpu 1 is not among CUDA_VISIBLE_DEVICES=4,15" in done.stderr


@pytest.mark.slow
def test_more_ranks_than_visible_gpus_are_refused(tmp_path):
    environment = programs(tmp_path, **{"nvidia-smi": "printf 'GPU 0\nGPU 1\n'"})
    environment.pop("DS_ACCELERATOR", None)
    done = run("multi_gpu.sh", "--ranks=3", cwd=tmp_path, env={**environment, "CUDA_VISIBLE_DEVICES": "0,1"})
    assert done.returncode == 2 and "--ranks 3: CUDA_VISIBLE_DEVICES=0,1 names fewer GPUs" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ""),
    ],
)
@pytest.mark.parametrize("script", ["single_gpu.sh", "multi_gpu.sh --ranks 2", "multi_node.sh --hostfile HOSTS"])
def test_training_extends_its_segments_of_gpu_memory_unless_the_user_has_set_up_the_allocator(
    script, given, expected, tmp_path
):
    told = '{ echo 0 >"$SORSA_EXIT_FILE"; echo "<$PYTORCH_ALLOC_CONF>"; }'
    environment = programs(tmp_path, python="[[ $1 == *check.py ]] || " + told, deepspeed=told)
    (tmp_path / "HOSTS").write_text("localhost slots=2\n")
    name, *words = script.split()
    where = ["--node_rank", "0"] if name == "multi_node.sh" else []
    done = run(name, *words, *where, cwd=tmp_path, env={**environment, **given})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"<{expected}>\n"


def test_what_is_not_training_is_left_as_it_is(tmp_path):
    """vLLM's GPUs cannot share memory of segments that grow."""
    environment = programs(tmp_path, deepspeed='echo "<$PYTORCH_ALLOC_CONF>"')
    (tmp_path / "HOSTS").write_text("localhost slots=1\n")
    words = ["--hostfile", "HOSTS", "--node_rank", "0", "--script", str(ROOT / "launch" / "evaluate.py")]
    assert run("multi_node.sh", *words, cwd=tmp_path, env=environment).stdout == "<>\n"


@pytest.mark.slow
def test_gpus_that_deepspeed_would_not_take_are_refused(tmp_path):
    (tmp_path / "HOSTS").write_text("one slots=2\n")
    chosen = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "2,3"}
    done = run("multi_node.sh", "--hostfile", "HOSTS", "--node_rank", "0", cwd=tmp_path, env=chosen)
    assert done.returncode == 2
    assert "instead of CUDA_VISIBLE_DEVICES=2,3: say --torchrun" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["--torchrun"]], ids=["deepspeed", "torchrun"])
def test_a_node_that_does_not_come_ends_the_others_within_the_time_out(project, tmp_path, launcher):
    """Torchrun makes 1 of every exit code; the script passes the rank's on."""
    (tmp_path / "HOSTS").write_text("one slots=1\ntwo slots=1\n" if not launcher else "one slots=1\n")
    port = str(free_port())
    wrong = "train.timeout_minutes=0.1"
    if launcher:  # its own rendezvous waits for the nodes; here a rank fails for another reason
        wrong = "adapter.targets=[qproj]"
    done = run(
        "multi_node.sh", "--hostfile", "HOSTS", "--node_rank", "0", "--master_addr", "127.0.0.1", *launcher,
        "--master_port", port, *settings(project, "alone"), wrong, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    message = "matches no linear" if launcher else f"1 of 2 ranks came to 127.0.0.1:{port}, within 6 s"
    assert message in done.stderr
    assert "exit code 2 after 0:0" in done.stderr


@pytest.mark.slow
def test_nodes_without_a_hostfile_train_together(project):
    """Two launchers of one rank each, on one machine, as `sorsa train` starts them on two."""
    port = str(free_port())
    ends = [
        subprocess.Popen(
            [Path(sys.executable).with_name("sorsa"), "train", "--nodes", "2", "--gpus", "1", "--node_rank", str(node),
             "--master_addr", "127.0.0.1", "--master_port", port, *settings(project, "without-hostfile"),
             "train.steps=2", "--ds_config", "ds_configs/zero2.json"],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT,
        )
        for node in range(2)
    ]  # fmt: skip
    printed = [end.communicate(timeout=300)[0] for end in ends]
    assert [end.returncode for end in ends] == [0, 0], printed
    assert "2 x cpu, ZeRO stage 2" in printed[0], printed[0]
    assert json.loads((project / "without-hostfile" / "report.json").read_text())["world_size"] == 2
