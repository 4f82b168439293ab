"""What Slurm runs on each node of a job: a function that submitit calls there by its name.

submitit submits and starts; what its own handlers do is left to ours. They exit as soon as a signal comes, before the
run has saved, decide by the clock whether a job was preempted, and give up after a number of time limits (1.5.4). Ours
hand the signal on, wait for the run to save, and have Slurm queue the job again while Slurm still wants it.
"""

import os
import socket
import subprocess
from pathlib import Path

from llmkit.launchers.on_node import Place, run_on_node

# Below the ports that Linux gives to those who ask for any.
FIRST_PORT, PORTS = 20000, 10000


def run_job(run_dir: str) -> None:
    """One node of a run. Ends the process with the exit code of the contract, which is what Slurm shows."""
    code = run_on_node(Path(run_dir), place(), requeue=requeue)
    if code:
        raise SystemExit(code)


def place() -> Place:
    """This node's place in the job, as Slurm says."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    job = SlurmJobEnvironment()
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if job.num_nodes == 1:
        return Place(host=host)
    port = FIRST_PORT + int(job.raw_job_id) % PORTS
    meeting = f"{_address(job.hostnames[0])}:{port}"
    return Place(rank=job.node, nodes=job.num_nodes, rendezvous=meeting, host=host)


def requeue() -> bool:
    """Queue this job again, if Slurm still wants it; a job that was cancelled is to end."""
    job_id = os.environ["SLURM_JOB_ID"]
    if _shown("job", job_id, "JobState") != "RUNNING":
        return False
    return subprocess.run(["scontrol", "requeue", job_id], check=False, timeout=60).returncode == 0


def _address(node: str) -> str:
    """An address of a node: its name, where that is known, or what Slurm reaches it by."""
    try:
        socket.gethostbyname(node)
    except OSError:
        return _shown("node", node, "NodeAddr") or node
    return node


def _shown(kind: str, name: str, field: str) -> str | None:
    """One field of what `scontrol show` says of a job or a node."""
    said = subprocess.run(
        ["scontrol", "--oneliner", "show", kind, name], capture_output=True, text=True, check=False, timeout=60
    ).stdout
    fields = dict(word.partition("=")[::2] for word in said.split())
    return fields.get(field)
