"""A real Slurm: a job that its time limit interrupts goes on by itself, one that fails does not."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.jobs import SECONDS, Hold, last_lines, need, same
from tests.helpers.projects import ROOT, metrics, settings
from tests.helpers.slurm import Slurm

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def slurm():
    need("sbatch", "slurmctld", "slurmd", "munged")
    with Slurm(nodes=2) as cluster:
        yield cluster


def submit(slurm, project, script: str, *arguments: str, options=(), checked=False, **more: str) -> str:
    """sbatch; returns the job's number. The job's own log is PROJECT/NUMBER.log, the nodes' are in PROJECT/logs.

    checked: through the script itself, which then submits itself.
    """
    slurm.environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SORSA_REPOSITORY": str(ROOT),
        "SORSA_CACHE": str(project / "cache"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **more,
    }  # fmt: skip
    path, options = str(ROOT / "launch" / "slurm" / script), ["--parsable", f"--output={project}/%j.log", *options]
    command = ["bash", path, *options, "--"] if checked else ["sbatch", *options, path]
    return slurm.run(*command, "--ranks_per_node=1", *arguments, cwd=project).strip()


def test_a_job_is_told_of_its_time_limit_saves_is_queued_again_and_finishes(slurm, project, reference, tmp_path):
    hold = Hold(tmp_path, step=4)
    arguments = [*settings(project, ""), "output.save_every=3", "--logs", str(tmp_path / "logs")]
    arguments.remove("output.name=")
    options = ["--nodes=2", "--time=30", "--signal=USR1@90", "--job-name=night"]
    number = submit(slurm, project, "train.sbatch", *arguments, options=options, **hold.environment)
    log = project / f"{number}.log"
    hold.wait(ranks=2)
    # The limit is now a minute or two away: Slurm sends the signal when it next looks, twice a minute.
    minutes, _ = map(int, slurm.job(number)["RunTime"].split(":")[1:])
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes + 2}")
    until = time.monotonic() + SECONDS
    while slurm.job(number)["Restarts"] == "0":
        assert time.monotonic() < until, last_lines(log)
        time.sleep(0.5)
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    job = slurm.wait(number, SECONDS)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), last_lines(log)
    told = log.read_text()
    for line in ("start 1: 2 nodes x 1 ranks", "exit code 75 after", "saved; queued again", "start 2:", "exit code 0"):
        assert line in told, told
    node_logs = [path.read_text() for path in sorted((tmp_path / "logs").glob("node-*.log"))]
    assert "SIGUSR1: stopped after step 4 of 6; all of it is in" in node_logs[0]
    assert "Going on after step 4" in node_logs[0]
    assert all("exit code 0 after" in text for text in node_logs)
    run = project / f"night-{number}"
    assert same(run, reference)
    check_the_rest(slurm, project, run)


def check_the_rest(slurm, project, run):
    """Another failure is passed on and not queued again; the finished run is evaluated. Both at once, a node each."""
    bad = submit(slurm, project, "train.sbatch", *settings(project, "bad"), "adapter.targets=[qproj]")
    good = submit(slurm, project, "evaluate.sbatch", "--model", run.name, "--task", "loss", checked=True)
    job = slurm.wait(bad, SECONDS)
    log = project / f"{bad}.log"
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), last_lines(log)
    assert "exit code 2 after" in log.read_text()
    assert slurm.wait(good, SECONDS)["JobState"] == "COMPLETED", last_lines(project / f"{good}.log")
    [told] = (project / "logs" / f"sorsa-evaluate-{good}").glob("node-*.log")
    loss = float(told.read_text().split("held-out loss")[1].split()[0])
    assert loss == pytest.approx(metrics(run, "eval_loss")[-1], rel=1e-5)
