"""A real Slurm of two nodes on this machine, for tests: Debian's packages, no systemd, all in a directory of its own.

with SlurmCluster() as cluster:
    subprocess.run(["sinfo"], env=os.environ | cluster.environment)
"""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
MUST = "LLMKIT_TEST_CLUSTERS"  # set where these tests may not be skipped
NODES = ("node1", "node2")
# Credentials of 5 seconds: a job that is queued again waits until those of its last start have ended, 120 s by default.
CONF = """\
ClusterName=llmkit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=30
SchedulerParameters=bf_interval=1,sched_interval=2
PartitionName=main Nodes=ALL Default=YES State=UP
PartitionName=other Nodes=node1 State=UP
"""


class SlurmCluster:
    """munged, slurmctld and a slurmd for each of NODES; they end with the `with`."""

    def __enter__(self) -> Self:
        self.base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path is at most 107 bytes
        for name in ("munge", "state", *NODES):
            (self.base / name).mkdir()
        self.base.chmod(0o755)
        key = self.base / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        controller, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(host=host, controller=controller, base=self.base, user=getpass.getuser())
        for name, port in zip(NODES, ports, strict=True):
            text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000\n"
        self.conf = self.base / "slurm.conf"
        self.conf.write_text(text)
        self.environment = {"SLURM_CONF": str(self.conf)}
        self._daemons: dict[str, subprocess.Popen] = {}
        munge = self.base / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        wait_until((munge / "socket").exists, "munged does not start", 30)
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%D %t") == f"{len(NODES)} idle", self.told, 60)
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + 15
        while self.ask("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in NODES:
            self.kill_node(name)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            daemon.wait(timeout=30)
        shutil.rmtree(self.base, ignore_errors=True)

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says."""
        env = os.environ | self.environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """The state of every job that has not ended."""
        return dict(line.split() for line in self.ask("squeue", "-h", "-r", "-o", "%i %T").splitlines())

    def start_node(self, name: str) -> None:
        """A node that has been killed comes back."""
        self._start(name, "slurmd", "-D", "-f", str(self.conf), "-N", name)

    def kill_daemon(self, name: str) -> None:
        """End a node's slurmd; what runs there goes on."""
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()

    def kill_node(self, name: str) -> None:
        """End a node as a power cut would: its slurmd and all that runs there."""
        self.kill_daemon(name)
        for step in psutil.process_iter():
            try:
                if step.name().startswith("slurmstepd") and Path(step.cwd()) == self.base / name:
                    for process in [step, *step.children(recursive=True)]:
                        process.kill()
            except psutil.Error:
                continue

    def told(self) -> str:
        """What the daemons have written, for the message of a test that fails."""
        logs = [path.read_text(errors="replace")[-2000:] for path in sorted(self.base.glob("*.log"))]
        return "\n".join([self.ask("sinfo", "-N", "-l"), *logs])

    def _start(self, name: str, *command: str) -> None:
        folder = self.base / name if name in NODES else self.base  # by which `kill_node` knows what runs on a node
        with open(self.base / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, cwd=folder, env=os.environ | self.environment, stdout=output, stderr=output
            )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(holds, message, seconds: float) -> None:
    """Look again and again; `message` (a text, or a function that makes it) is that of the failure."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, message() if callable(message) else message
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm(closed_world: None) -> Iterator[SlurmCluster]:
    """A Slurm of two nodes. Skips the test where Slurm is not installed, unless LLMKIT_TEST_CLUSTERS is set."""
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        reason = f"there is no {missing[0]} here: apt-get install slurm-wlm munge"
        assert MUST not in os.environ, reason
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster
