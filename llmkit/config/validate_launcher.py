"""Rules for `launcher.*`: what its scheduler would refuse only once a job is submitted, or not understand at all."""

import re

from llmkit.config.launcher_schema import RayLauncherConfig, SlurmLauncherConfig
from llmkit.config.schema import TrainConfig
from llmkit.errors import did_you_mean

# sbatch --time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")

ADDRESS = re.compile(r"auto|local|(ray://)?(\[[\da-fA-F:]+\]|[^\s:/]+):\d+")
# Resources that Ray names itself, and the settings that ask for them.
RAYS_OWN = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "mem_gb"}


def launcher_problems(config: TrainConfig) -> list[str]:
    """What is wrong with `launcher.*`."""
    if isinstance(config.launcher, SlurmLauncherConfig):
        return _slurm_problems(config, config.launcher)
    if isinstance(config.launcher, RayLauncherConfig):
        return _ray_problems(config, config.launcher)
    return []


def _slurm_problems(config: TrainConfig, launcher: SlurmLauncherConfig) -> list[str]:
    problems = []
    if launcher.time is not None and not TIME.fullmatch(str(launcher.time)):
        problems.append(f"launcher.time={launcher.time}: minutes (90), HH:MM:SS (1:30:00) or D-HH:MM:SS (2-12:00:00).")
    gpus, processes = launcher.gpus_per_node, config.hardware.num_processes
    if gpus is not None and gpus != processes and (gpus or config.hardware.device == "cuda"):
        problems.append(
            f"launcher.gpus_per_node={gpus}: a process takes one GPU, and hardware.num_processes={processes}; set "
            "that, and leave launcher.gpus_per_node out."
        )
    for key in launcher.additional_parameters:
        if key.startswith("-"):
            problems.append(f"launcher.additional_parameters.{key}: without dashes, {key.lstrip('-')}.")
    return problems


def _ray_problems(config: TrainConfig, launcher: RayLauncherConfig) -> list[str]:
    problems, gpus, processes = [], launcher.num_gpus, config.hardware.num_processes
    if not ADDRESS.fullmatch(launcher.address):
        problems.append(
            f"launcher.address={launcher.address}: auto, local, HOST:PORT (10.0.0.1:6379) or ray://HOST:PORT "
            f"(ray://10.0.0.1:10001).{did_you_mean(launcher.address, ('auto', 'local'))}"
        )
    if launcher.address == "local" and not launcher.wait:
        problems.append(
            "launcher.wait=false with launcher.address=local: that Ray, and all that it runs, ends with this command; "
            "leave launcher.wait out, or start a Ray that stays (ray start --head) and leave launcher.address out."
        )
    shared = processes == 1 and gpus is not None and 0 < gpus <= 1
    if gpus is not None and gpus != processes and not shared and (gpus or config.hardware.device == "cuda"):
        problems.append(
            f"launcher.num_gpus={gpus:g}: a process takes one GPU, or one process a part of one, and "
            f"hardware.num_processes={processes}; set that, and leave launcher.num_gpus out."
        )
    for kind in launcher.resources.keys() & RAYS_OWN.keys():
        problems.append(f"launcher.resources.{kind}: is launcher.{RAYS_OWN[kind]}.")
    return problems


def launcher_warnings(config: TrainConfig) -> list[str]:
    """Settings of `launcher.*` without an effect."""
    launcher = config.launcher
    if isinstance(launcher, RayLauncherConfig):
        layout = launcher.placement_strategy != "STRICT_SPREAD" and config.hardware.num_nodes == 1
        return ["launcher.placement_strategy has no effect with one node (hardware.num_nodes=1)."] if layout else []
    if not isinstance(launcher, SlurmLauncherConfig):
        return []
    if launcher.container is None and (launcher.container_args or launcher.container_runtime != "apptainer"):
        return ["launcher.container_args and container_runtime have no effect without launcher.container."]
    return []
