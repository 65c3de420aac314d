"""Several launchers that only share an address: on one machine, and on two hosts one of which goes away in mid-run."""

import os
import subprocess
from pathlib import Path

import pytest

from sorsa_ds.runtime.ports import free_port
from tests.helpers.forked import launch_forked
from tests.helpers.hosts import ADDRESSES, INTERFACE, NAMES, Hosts
from tests.helpers.jobs import SECONDS, Hold, need, same
from tests.helpers.projects import ROOT, environment_of, metrics, settings

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def command(hostfile: Path, *arguments: str) -> list[str]:
    """launch/multi_node.sh, as it is typed on every node."""
    return ["bash", str(ROOT / "launch" / "multi_node.sh"), "--hostfile", str(hostfile), *arguments]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, everything printed) of each."""
    printed = [process.communicate(timeout=SECONDS)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def test_two_launchers_on_one_machine_train_as_one(project, reference, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("one slots=1\n\n# two names of this machine\ntwo slots=1\n")
    where = ["--torchrun", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    processes = [
        subprocess.Popen(
            command(hostfile, "--node_rank", str(k), *where, *settings(project, "loopback")),
            cwd=project, env=environment_of(project), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for k in range(2)
    ]  # fmt: skip
    for code, printed in ended(processes):
        assert code == 0, printed[-3000:]
        assert "exit code 0 after 0:0" in printed
    assert same(project / "loopback", reference)


@pytest.fixture(scope="module")
def hosts():
    need("ip", "unshare")
    with Hosts() as both:
        yield both


def test_hosts_of_a_process_that_is_gone_are_removed():
    need("ip")
    gone = subprocess.Popen(["true"])
    gone.wait()
    space = f"sorsa-{gone.pid}-host-a"
    subprocess.run(["ip", "netns", "add", space], check=True)
    with Hosts():
        left = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert space not in left
    assert f"sorsa-{os.getpid()}-host-a" in left


def start(hosts, project, tmp_path, *arguments: str, on_b=(), **more: str) -> list[subprocess.Popen]:
    """Start one command on both hosts, `on_b` added on one; each finds its line in the hostfile by its address."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return [
        hosts.start(
            host, command(hostfile, *arguments, *(on_b if host else ())), cwd=project, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment_of(project, GLOO_SOCKET_IFNAME=INTERFACE, **more),
        )
        for host in range(2)
    ]  # fmt: skip


def test_a_host_that_goes_away_ends_the_other_and_the_job_goes_on(hosts, project, reference, tmp_path):
    """First one dies while a checkpoint is written, then the network fails; at its end the job has the losses of one
    that nothing has stopped."""
    run = project / "unlucky"
    more = ["--resume=auto", "output.save_every=2", "train.timeout_minutes=0.5"]
    arguments = [*settings(project, run.name), *more]

    hold = Hold(tmp_path / "first", step=4)
    processes = start(hosts, project, tmp_path, *arguments, **hold.environment)
    hold.wait(ranks=2)
    hosts.kill(1)
    hold.release()
    (code, printed), (killed, _) = ended(processes)
    assert (code, killed) == (1, -9), printed[-3000:]
    assert "2 ranks on 2 nodes" in printed
    assert all(f"  {name}  rank {rank}, 1 x CPU; free: " in printed for rank, name in enumerate(NAMES))
    assert "node host-a: stopped because another rank cannot be reached" in printed, printed[-3000:]
    assert len(metrics(run, "loss")) == 4

    hold = Hold(tmp_path / "second", step=5)
    processes = start(hosts, project, tmp_path, *arguments, **hold.environment)
    hold.wait(ranks=2)
    hosts.cut(1)
    hold.release()
    for name, (code, printed) in zip(NAMES, ended(processes), strict=True):
        assert code == 1, printed[-3000:]
        assert f"node {name}: stopped because another rank has not answered within train.timeout" in printed, printed
        assert "--resume auto continues from the last one" in printed
    hosts.mend(1)
    assert len(metrics(run, "loss")) == 5

    launch_forked(project, run.name, *more)
    assert same(run, reference)


def test_nodes_that_disagree_are_named_and_nothing_is_started(hosts, project, tmp_path):
    for code, printed in ended(start(hosts, project, tmp_path, *settings(project, "torn"), on_b=["adapter.rank=5"])):
        assert code == 2, printed[-3000:]
        assert "node host-b (rank 1): adapter.rank is 5, on host-a 4" in printed
    assert not (project / "torn").exists()
