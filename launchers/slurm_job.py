"""What Slurm runs on each node of a job: a function that submitit calls by its name, and the shell lines around it.

submitit submits and starts; what its own handlers do is left to ours. They exit as soon as a signal comes, before the
run has saved, decide by the clock whether a job was preempted, and give up after a number of time limits (1.5.4). Ours
hand the signal on, wait for the run to save, and have Slurm queue the job again while Slurm still wants it.

Slurm is asked by the shell lines alone: they run on the first node, outside a container, which lacks its commands.
"""

import os
import socket
from pathlib import Path

from llmkit.errors import EXIT_FAILED, EXIT_PREEMPTED
from llmkit.launchers.job_record import INTERRUPTED, JobRecord
from llmkit.launchers.on_node import Place, run_on_node

# Below the ports that Linux gives to those who ask for any.
FIRST_PORT, PORTS = 20000, 10000
FIRST_NODE = "LLMKIT_FIRST_NODE"  # an address of the node where those of a job meet

# The node's name, where that is known, or what Slurm reaches it by.
BEFORE = (
    f'export {FIRST_NODE}="$(getent hosts "$SLURMD_NODENAME" > /dev/null && echo "$SLURMD_NODENAME" || '
    'scontrol --oneliner show node "$SLURMD_NODENAME" | sed -n "s/.* NodeAddr=\\([^ ]*\\).*/\\1/p")"',
    "set +e  # what follows the run depends on how it ends",
)
# A job that is cancelled, or queued again by Slurm itself, is no longer RUNNING. The number of an array's last job is
# that of the array too, so the name of one is needed.
AFTER = (
    "code=$?",
    'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
    'job="${job:-$SLURM_JOB_ID}"',
    f'if [ $code -eq {EXIT_PREEMPTED} ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then',
    '  scontrol requeue "$job"',
    "fi",
    "exit $code",
)


def run_job(run_dir: str) -> None:
    """One node of a run. Ends the process with the exit code of the contract; 75 has Slurm queue the job again."""
    here = place()
    code = run_on_node(Path(run_dir), here)
    if code == EXIT_PREEMPTED and not (here.rank == 0 and _goes_on(Path(run_dir))):
        code = EXIT_FAILED  # of all nodes' codes Slurm takes the highest
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
    return Place(rank=job.node, nodes=job.num_nodes, rendezvous=f"{os.environ[FIRST_NODE]}:{port}", host=host)


def _goes_on(run_dir: Path) -> bool:
    record = JobRecord.read(run_dir)
    return record is not None and record.state == INTERRUPTED
