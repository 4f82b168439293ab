"""The options of `launcher=`, one dataclass each: where runs are started, and what is asked of that place.

The names of `launcher=slurm` are sbatch's and submitit's, those of `launcher=ray` Ray's.
"""

from dataclasses import dataclass
from typing import Any

from llmkit.config.setting import setting


@dataclass(kw_only=True, slots=True)
class MachineLauncherConfig:
    """What all launchers have in common whose runs are processes of this machine."""

    warm: bool = setting(
        True, "Fork the jobs of a sweep from one process that has imported the libraries; false: each imports them."
    )


@dataclass(kw_only=True, slots=True)
class LocalLauncherConfig(MachineLauncherConfig):
    name: str = setting("local", "The option of the launcher group.")
    max_parallel: int | None = setting(None, "Jobs of a sweep at a time; unset: one per GPU, one on a CPU.", ge=1)


@dataclass(kw_only=True, slots=True)
class PackedLauncherConfig(MachineLauncherConfig):
    name: str = setting("packed", "The option of the launcher group.")
    width: int | None = setting(
        None, "Runs that train at a time on one base; unset: as many as keep the device busy and fit.", ge=1
    )
    verify: int = setting(0, "First steps of each run that are compared with the same ones alone.", ge=0)


@dataclass(kw_only=True, slots=True)
class ClusterLauncherConfig:
    """What all launchers have in common that hand runs to a scheduler."""

    preflight: bool = setting(
        True, "Check model access, the data and servability here, before anything is queued; false: on the node."
    )
    wait: bool = setting(True, "Follow the jobs to their end; false: return once they are queued (see llmkit jobs).")
    poll_s: float = setting(10.0, "Seconds between two questions to the scheduler while jobs are followed.", gt=0)


@dataclass(kw_only=True, slots=True)
class SlurmLauncherConfig(ClusterLauncherConfig):
    name: str = setting("slurm", "The option of the launcher group.")
    partition: str | None = setting(None, "Partition, or several with commas between; unset: the cluster's default.")
    account: str | None = setting(None, "Account that the time is charged to; unset: the user's default.")
    qos: str | None = setting(None, "Quality of service; unset: the user's default.")
    gpus_per_node: int | None = setting(
        None, "GPUs per node; unset: hardware.num_processes where the partition has GPUs, none elsewhere.", ge=0
    )
    cpus_per_task: int | None = setting(None, "CPU cores on each node; unset: hardware.num_processes.", ge=1)
    mem_gb: float | None = setting(None, "Memory per node in GB; unset: the cluster's default.", gt=0)
    time: Any = setting(None, "Time limit: minutes, HH:MM:SS or D-HH:MM:SS; unset: the partition's.", text=True)
    constraint: str | None = setting(None, "Features that nodes must have, in sbatch's grammar.")
    exclude: str | None = setting(None, "Nodes that are not used.")
    nodelist: str | None = setting(None, "Nodes that are used.")
    array_parallelism: int = setting(256, "Jobs of a sweep at a time.", ge=1)
    signal_delay_s: int = setting(
        120, "Seconds before the time limit at which a run is told to save and is queued again.", ge=10, le=65535
    )
    setup: list[str] = setting(
        [], "Shell lines before the run: [module load cuda]; they are written to disk, so no secrets.", text=True
    )
    python: str | None = setting(
        None,
        "Command that is Python on the nodes (python: setup's), with llmkit and submitit; unset: this one's own path.",
    )
    container: str | None = setting(None, "Container image that Python runs in: a file or docker://...")
    container_runtime: str = setting(
        "apptainer", "What starts the container.", choices=("apptainer", "singularity", "pyxis")
    )
    container_args: list[str] = setting(
        [], "More arguments of the container runtime: [--bind, /data:/data].", text=True
    )
    additional_parameters: dict[str, Any] = setting({}, "Other options of sbatch by their names: {mail-type: END}.")


@dataclass(kw_only=True, slots=True)
class RayLauncherConfig(ClusterLauncherConfig):
    name: str = setting("ray", "The option of the launcher group.")
    address: str = setting(
        "auto",
        "The cluster: auto (RAY_ADDRESS, or this machine's), HOST:PORT, ray://HOST:PORT, or local (one of its own).",
    )
    poll_s: float = setting(30.0, "Seconds between two questions to Ray while jobs are followed.", gt=0)
    num_cpus: float | None = setting(None, "CPU cores on each node; unset: hardware.num_processes.", ge=0)
    num_gpus: float | None = setting(
        None, "GPUs on each node, 0.5 for half of one; unset: hardware.num_processes where the cluster has GPUs.", ge=0
    )
    mem_gb: float | None = setting(None, "Memory on each node in GB that Ray counts with; unset: none.", gt=0)
    resources: dict[str, float] = setting({}, "Amounts of the cluster's own resources on each node: {license: 1}.")
    placement_strategy: str = setting(
        "STRICT_SPREAD",
        "How the nodes of one job are laid out: STRICT_SPREAD keeps them on different machines.",
        choices=("STRICT_SPREAD", "SPREAD", "PACK"),
    )
    max_retries: int = setting(3, "Times that a run is started again after its node was lost.", ge=0)
    check_resources: bool = setting(
        True, "Refuse what no node has now; false: on a cluster that adds nodes as they are needed."
    )
    runtime_env: dict[str, Any] = setting({}, "Ray's runtime_env of a run: {env_vars: {KEY: value}}.")


# Option of the launcher group -> the dataclass that types it.
LAUNCHERS: dict[str, type] = {
    "local": LocalLauncherConfig,
    "packed": PackedLauncherConfig,
    "slurm": SlurmLauncherConfig,
    "ray": RayLauncherConfig,
}
