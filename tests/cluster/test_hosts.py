"""Several launchers that only share an address: on one machine, and on two hosts one of which goes away in mid-run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SECONDS, Hold, need, same
from hosts import ADDRESSES, INTERFACE, NAMES, Hosts
from projects import ROOT, metrics, settings

pytestmark = pytest.mark.cluster


def environment(project, **more: str) -> dict[str, str]:
    return {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "SORSA_CACHE": str(project / "cache"), **more,
    }  # fmt: skip


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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    where = ["--torchrun", "--master_addr", "127.0.0.1", "--master_port", port]
    processes = [
        subprocess.Popen(
            command(hostfile, "--node_rank", str(k), *where, *settings(project, "loopback")),
            cwd=project, env=environment(project), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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


def start(hosts, project, tmp_path, *arguments: str, **more: str) -> list[subprocess.Popen]:
    """The same command on both hosts; each finds its own line in the hostfile by its address."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return [
        hosts.start(
            host, command(hostfile, *arguments), cwd=project, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment(project, GLOO_SOCKET_IFNAME=INTERFACE, **more),
        )
        for host in range(2)
    ]  # fmt: skip


def go_on(hosts, project, tmp_path, name, reference):
    """The same command again, on both hosts, finishes the job."""
    for code, printed in ended(start(hosts, project, tmp_path, *settings(project, name), "--resume", "auto")):
        assert code == 0, printed[-3000:]
    assert same(project / name, reference)


def test_a_host_that_is_cut_off_ends_the_other_and_the_job_goes_on(hosts, project, reference, tmp_path):
    hold = Hold(tmp_path, step=5)
    arguments = [*settings(project, "cut"), "output.save_every=3", "train.timeout_minutes=0.5"]
    processes = start(hosts, project, tmp_path, *arguments, **hold.environment)
    try:
        hold.wait(ranks=2)
        hosts.cut(1)
        hold.release()
        for name, (code, printed) in zip(NAMES, ended(processes), strict=True):
            assert code == 1, printed[-3000:]
            assert f"node {name}: stopped because another rank has not answered within train" in printed, printed
            assert "--resume auto goes on" in printed
        rank_map = "\n".join(f"  {name}  rank {rank}, 1 x CPU" for rank, name in enumerate(NAMES)).splitlines()
        told = (project / "cut" / "metrics.jsonl").exists() and printed
        assert told and rank_map
    finally:
        hosts.mend(1)
    assert (project / "cut" / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert len(metrics(project / "cut", "loss")) == 5
    go_on(hosts, project, tmp_path, "cut", reference)


def test_a_host_that_dies_ends_the_other_and_the_job_goes_on(hosts, project, reference, tmp_path):
    hold = Hold(tmp_path, step=5)
    arguments = [*settings(project, "died"), "output.save_every=3"]
    processes = start(hosts, project, tmp_path, *arguments, **hold.environment)
    hold.wait(ranks=2)
    hosts.kill(1)
    hold.release()
    (code, printed), (killed, _) = ended(processes)
    assert (code, killed) == (1, -9), printed[-3000:]
    assert f"node {NAMES[0]}: stopped because another rank is gone" in printed, printed
    go_on(hosts, project, tmp_path, "died", reference)


def test_nodes_that_disagree_are_named_and_nothing_is_started(hosts, project, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    processes = [
        hosts.start(
            host, command(hostfile, *settings(project, "torn"), f"sorsa.rank={4 + host}"), cwd=project, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment(project, GLOO_SOCKET_IFNAME=INTERFACE),
        )
        for host in range(2)
    ]  # fmt: skip
    for code, printed in ended(processes):
        assert code == 2, printed[-3000:]
        assert "node host-b (rank 1): sorsa.rank is 5, on host-a 4" in printed
    assert not (project / "torn").exists()
