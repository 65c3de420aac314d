"""A real Slurm on this machine, from Debian's packages: munged, slurmctld and one slurmd a node, all our own."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from sorsa_ds.runtime.ports import free_port

SECONDS = 60
"""How long a daemon may take to come up."""

CONF = """\
ClusterName=sorsa
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts again when the old job's credentials have expired, by default after two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
MinJobAge=300
SchedulerParameters=sched_interval=2,batch_sched_delay=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Context in which a cluster of `nodes` nodes is up; when it ends, its daemons and files are gone.

    folder: the folder with the cluster's files.
    environment: the environment variables for the commands of the cluster's users.
    """

    def __init__(self, nodes: int):
        self.names = [f"n{i}" for i in range(nodes)]
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        self.folder = Path(tempfile.mkdtemp(prefix="sorsa-slurm-"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._write()
            self._start_munge()
            self._daemon("slurmctld", "-D", "-i")
            for name in self.names:
                self._daemon("slurmd", "-D", "-N", name)
            self._wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(self.names)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def run(self, *command: str, **options) -> str:
        """Run one of Slurm's commands, and return what it prints."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, **options)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """The job when it has ended."""
        until = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            assert time.monotonic() < until, f"job {number} has not ended:\n{job}\n{self.logs()}"
            time.sleep(0.5)
        return job

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def _write(self) -> None:
        ports = [free_port() for _ in range(len(self.names) + 1)]
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={os.cpu_count()} State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        for folder in ("state", *(f"spool-{name}" for name in self.names)):
            (self.folder / folder).mkdir()
        conf = CONF.format(host=host, port=ports[0], folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(conf)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(64))
        files = {
            "--key-file": key,
            "--socket": self.folder / "munge.socket",
            "--pid-file": self.folder / "munged.pid",
            "--log-file": self.folder / "munged.log",
            "--seed-file": self.folder / "munged.seed",
        }
        self._daemon("munged", "--foreground", "--force", *(f"{option}={path}" for option, path in files.items()))
        self._wait_for(files["--socket"].exists)

    def _daemon(self, program: str, *arguments: str) -> None:
        log = (self.folder / f"{program}-{len(self._daemons)}.out.log").open("w")
        self._daemons.append(
            subprocess.Popen([f"/usr/sbin/{program}", *arguments], env=self.environment, stdout=log, stderr=log)
        )

    def _wait_for(self, condition) -> None:
        until = time.monotonic() + SECONDS
        while not condition():
            dead = next((process.args for process in self._daemons if process.poll() is not None), None)
            assert dead is None and time.monotonic() < until, f"Slurm does not come up ({dead}):\n{self.logs()}"
            time.sleep(0.2)

    def __exit__(self, *_) -> None:
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "--user=root", "--full", "--signal=KILL"], env=self.environment, check=False)
        for process in reversed(self._daemons):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
