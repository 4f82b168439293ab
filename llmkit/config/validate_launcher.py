"""Rules for `launcher.*`: what its scheduler would refuse only once a job is submitted, or not understand at all."""

import re

from llmkit.config.launcher_schema import SlurmLauncherConfig
from llmkit.config.schema import TrainConfig

# sbatch --time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")


def launcher_problems(config: TrainConfig) -> list[str]:
    """What is wrong with `launcher.*`."""
    launcher = config.launcher
    if not isinstance(launcher, SlurmLauncherConfig):
        return []
    problems = []
    if launcher.time is not None and not TIME.fullmatch(str(launcher.time)):
        problems.append(f"launcher.time={launcher.time}: minutes (90), HH:MM:SS (1:30:00) or D-HH:MM:SS (2-12:00:00).")
    gpus, processes = launcher.gpus_per_node, config.hardware.num_processes
    if gpus is not None and gpus != processes and (gpus or config.hardware.device == "cuda"):
        problems.append(
            f"launcher.gpus_per_node={gpus}: a process takes one GPU, and hardware.num_processes={processes}; set that, "
            "and leave launcher.gpus_per_node out."
        )
    for key in launcher.additional_parameters:
        if key.startswith("-"):
            problems.append(f"launcher.additional_parameters.{key}: without dashes, {key.lstrip('-')}.")
    return problems


def launcher_warnings(config: TrainConfig) -> list[str]:
    """Settings of `launcher.*` without an effect."""
    launcher = config.launcher
    if not isinstance(launcher, SlurmLauncherConfig):
        return []
    if launcher.container is None and (launcher.container_args or launcher.container_runtime != "apptainer"):
        return ["launcher.container_args and container_runtime have no effect without launcher.container."]
    return []
