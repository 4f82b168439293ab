"""`launcher=slurm`: runs as jobs of a Slurm cluster, through submitit. One job per run; those of a sweep are one array.

What a job does is in slurm_job.py.
"""

import contextlib
import getpass
import io
import os
import shlex
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llmkit.config import TrainConfig
from llmkit.config.launcher_schema import SlurmLauncherConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.install_command import install_command
from llmkit.launchers.cluster import SchedulerError, Seen, Submitted
from llmkit.launchers.job_record import ENDED, QUEUED, RUNNING
from llmkit.launchers.local import package_parent
from llmkit.launchers.slurm_job import AFTER, BEFORE, run_job

FOLDER = "slurm"  # below a run's or a sweep's directory: what submitit and Slurm write
TIMEOUT = 60  # seconds that one of Slurm's commands may take
# States of squeue in which a job has yet to run, or runs; any other is an end.
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
AT_WORK = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "COMPLETING"}

CORES = {"cpus-per-task", "cpus-per-gpu", "exclusive"}  # options of sbatch
GPUS_IN_CONTAINER = {"--nv", "--nvccli", "--rocm"}  # ways to have them, of apptainer and singularity


def connect(launcher: SlurmLauncherConfig) -> "Slurm":
    """The cluster that this machine belongs to. Raises ConfigError if it belongs to none."""
    missing = [command for command in ("sbatch", "squeue", "sinfo", "scancel", "srun") if shutil.which(command) is None]
    if missing:
        raise ConfigError(
            f"launcher=slurm: there is no {missing[0]} here; start from a machine of the cluster (its login node), or "
            "use launcher=local."
        )
    return Slurm()


@dataclass(frozen=True, slots=True)
class Partition:
    """What sinfo says of a partition."""

    name: str
    is_default: bool
    has_gpus: bool


@dataclass(slots=True)
class Slurm:
    """The Slurm cluster of this machine, asked through its commands."""

    outlives_driver: ClassVar[bool] = True
    _partitions: list[Partition] = field(default_factory=list)

    def check(self, config: TrainConfig) -> None:
        """Raise ConfigError for what Slurm would refuse, or never start."""
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"launcher=slurm needs submitit, which is not installed: {install_command('cluster', extra='cluster')}"
            ) from None
        launcher: SlurmLauncherConfig = config.launcher
        try:
            known = {partition.name: partition for partition in self.partitions()}
        except SchedulerError as error:
            raise ConfigError(
                f"launcher=slurm: no Slurm answers here. {error} Start from a machine of the cluster (its login node); "
                "export SLURM_CONF where its slurm.conf has a place of its own."
            ) from error
        wanted = launcher.partition.split(",") if launcher.partition else []
        for name in wanted:
            if name not in known:
                raise ConfigError(
                    f"launcher.partition={name}: this cluster has {', '.join(known)}.{did_you_mean(name, known)}"
                )
        if not wanted and not any(partition.is_default for partition in known.values()):
            raise ConfigError(f"launcher.partition: this cluster has no default; choose one of {', '.join(known)}.")
        if launcher.gpus_per_node and not self._has_gpus(launcher):
            raise ConfigError(
                f"launcher.gpus_per_node={launcher.gpus_per_node}: there are no GPUs in partition "
                f"{launcher.partition or 'of the default'}; those with GPUs: "
                f"{', '.join(name for name, partition in known.items() if partition.has_gpus) or 'none'}."
            )

    def partitions(self) -> list[Partition]:
        """The partitions of the cluster. Raises SchedulerError."""
        if not self._partitions:
            found: dict[str, Partition] = {}
            for line in _ask("sinfo", "--noheader", "--format=%P|%G").splitlines():  # a line for each kind of node
                name, _, resources = line.partition("|")
                default = name.endswith("*")
                name = name.rstrip("*")
                gpus = "gpu" in resources or (name in found and found[name].has_gpus)
                found[name] = Partition(name, default, gpus)
            self._partitions = list(found.values())
        return self._partitions

    def submit(self, configs: Sequence[TrainConfig], run_dirs: Sequence[Path]) -> list[Submitted]:
        """One array for all runs that ask for the same; see `cluster.Scheduler`."""
        alike: dict[str, list[int]] = {}
        for number, config in enumerate(configs):
            alike.setdefault(repr((config.launcher, _size(config))), []).append(number)
        taken: dict[int, Submitted] = {}
        try:
            for numbers in alike.values():
                here = [run_dirs[number] for number in numbers]
                taken |= zip(numbers, self._submit(configs[numbers[0]], here), strict=True)
        except ConfigError:
            self.cancel([job.job_id for job in taken.values()])
            raise
        return [taken[number] for number in range(len(configs))]

    def _submit(self, config: TrainConfig, run_dirs: Sequence[Path]) -> list[Submitted]:
        """Queue runs that differ in nothing that Slurm is asked for."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        above = run_dirs[0].parent if len(run_dirs) > 1 else run_dirs[0]
        folder = above / FOLDER
        is_new = not folder.exists()
        executor = SlurmExecutor(folder=folder, python=self.python_command(config))
        executor.update_parameters(job_name=f"llmkit-{above.name}", **self.parameters(config))
        said = io.StringIO()  # submitit prints what it raises, too
        try:
            with contextlib.redirect_stderr(said):
                jobs = executor.map_array(run_job, [str(run_dir) for run_dir in run_dirs])
        except (FailedJobError, FailedSubmissionError) as error:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(f"launcher=slurm: Slurm refuses the job: {_reason(str(error))}") from error
        return [Submitted(job_id=job.job_id, log=job.paths.stderr) for job in jobs]

    def parameters(self, config: TrainConfig) -> dict[str, Any]:
        """What submitit is given: sbatch's options by submitit's names."""
        launcher: SlurmLauncherConfig = config.launcher
        cpus = _cpus(config)
        given: dict[str, Any] = {
            "partition": launcher.partition,
            "account": launcher.account,
            "qos": launcher.qos,
            "cpus_per_task": cpus,
            "mem": f"{round(launcher.mem_gb * 1024)}MB" if launcher.mem_gb else None,
            "constraint": launcher.constraint,
            "exclude": launcher.exclude,
            "nodelist": launcher.nodelist,
            "gpus_per_node": self._gpus(config),
        }
        srun = ["--mpi=none"]  # torchrun makes the group, and MPI's variables would make Accelerate think of another
        if cpus:
            srun.append(f"--cpus-per-task={cpus}")  # from Slurm 22.05 on srun does not take sbatch's
        if launcher.container and launcher.container_runtime == "pyxis":
            srun += [f"--container-image={launcher.container}", *launcher.container_args]
        return {name: value for name, value in given.items() if value is not None} | {
            "time": launcher.time,  # None: the partition's; left out, submitit would say 5 minutes
            "nodes": config.hardware.num_nodes,
            "ntasks_per_node": 1,
            "signal_delay_s": launcher.signal_delay_s,
            "array_parallelism": launcher.array_parallelism,
            "setup": _setup(launcher),
            "teardown": list(AFTER),
            "srun_args": srun,
            "stderr_to_stdout": False,
            "wckey": None,
            # A node that fails must not end a run, whatever the cluster's JobRequeue is.
            "additional_parameters": {"requeue": True} | launcher.additional_parameters,
        }

    def python_command(self, config: TrainConfig) -> str | None:
        """The shell command that is Python on the nodes; None: this one's own path, which they share."""
        launcher: SlurmLauncherConfig = config.launcher
        python = launcher.python or ("python" if launcher.container else None)
        if launcher.container is None or launcher.container_runtime == "pyxis":
            return python
        arguments = launcher.container_args
        if self._gpus(config) and not GPUS_IN_CONTAINER.intersection(arguments):
            arguments = ["--nv", *arguments]  # pyxis sees to it itself
        return f"{shlex.join([launcher.container_runtime, 'exec', *arguments, launcher.container])} {python}"

    def _gpus(self, config: TrainConfig) -> int | None:
        launcher: SlurmLauncherConfig = config.launcher
        if launcher.gpus_per_node is not None or config.hardware.device == "cpu":
            return launcher.gpus_per_node or None
        if config.hardware.device == "cuda" or self._has_gpus(launcher):
            return config.hardware.num_processes
        return None

    def _has_gpus(self, launcher: SlurmLauncherConfig) -> bool:
        names = launcher.partition.split(",") if launcher.partition else None
        return any(
            partition.has_gpus
            for partition in self.partitions()
            if (partition.is_default if names is None else partition.name in names)
        )

    def seen(self, job_ids: Collection[str]) -> dict[str, Seen]:
        """What squeue says; it forgets a job some minutes after its end (MinJobAge), and needs no accounting."""
        said = _ask(
            "squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%R"
        )
        wanted, found = set(job_ids), {}
        for line in said.splitlines():
            job_id, state, detail = line.split("|", 2)
            if job_id in wanted:
                found[job_id] = _judge(state, detail)
        return found

    def cancel(self, job_ids: Collection[str]) -> None:
        """scancel."""
        if job_ids:
            _ask("scancel", "--quiet", *job_ids)


def _setup(launcher: SlurmLauncherConfig) -> list[str]:
    """The shell lines before a job. Without a Python of its own it has this one, and finds the llmkit of this one."""
    lines = list(launcher.setup)
    if launcher.python is None and launcher.container is None:
        lines.append(f"export PYTHONPATH={shlex.quote(package_parent())}${{PYTHONPATH:+:$PYTHONPATH}}")
    return [*lines, *BEFORE]


def _cpus(config: TrainConfig) -> int | None:
    """Cores of each node: one per process at least, unless the user's own options of sbatch say how many."""
    launcher: SlurmLauncherConfig = config.launcher
    said = CORES & {name.replace("_", "-") for name in launcher.additional_parameters}
    return launcher.cpus_per_task or (None if said else config.hardware.num_processes)


def _size(config: TrainConfig) -> tuple[Any, ...]:
    hardware = config.hardware
    return hardware.num_nodes, hardware.num_processes, hardware.device


def _judge(state: str, detail: str) -> Seen:
    if state in WAITING:
        return Seen(state=QUEUED, detail=detail.strip("()"))
    if state in AT_WORK:
        return Seen(state=RUNNING, detail=f"on {detail}")
    return Seen(state=ENDED, detail=state)


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=True, env=os.environ | {"LC_ALL": "C"}
        )
    except subprocess.CalledProcessError as error:
        raise SchedulerError(f"{command[0]} failed: {_reason(error.stderr)}.") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]} does not answer.") from error
    return done.stdout


def _reason(said: str) -> str:
    """The last thing that one of Slurm's commands has said, without its own name: the cause comes first or last."""
    lines = [line.partition("error: ")[2] or line for line in said.strip().splitlines()]
    return "; ".join(dict.fromkeys(line.strip() for line in lines)) or "it does not say why"
