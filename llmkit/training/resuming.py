"""Whether a run may go on from a checkpoint: on the data and from the weights that it began with."""

from pathlib import Path

from llmkit.config import TrainConfig
from llmkit.errors import ConfigError
from llmkit.training.checkpoints.manifest import read_manifest


def check_processes(config: TrainConfig, checkpoint: Path) -> None:
    """Raise ConfigError if DeepSpeed's part of the checkpoint was divided among another number of processes."""
    processes = config.hardware.num_processes * config.hardware.num_nodes
    saved_by = read_manifest(checkpoint)["world_size"]
    if config.deepspeed.stage and saved_by != processes:
        raise ConfigError(
            f"{checkpoint} was saved by {saved_by} processes with deepspeed={config.deepspeed.name}, which divides the "
            f"optimizer's state among them: it cannot go on with {processes}. Use hardware.num_processes="
            f"{saved_by // config.hardware.num_nodes} again, or begin another run from its weights: init_from=RUN "
            "name=ANOTHER."
        )


def check_data(config: TrainConfig, run_dir: Path, checkpoint: Path, fingerprint: str) -> None:
    """Raise ConfigError if the checkpoint was trained on other rows, or on the same in other tokens."""
    if read_manifest(checkpoint)["dataset_fingerprint"] != fingerprint and "data" not in config.resume_allow:
        raise ConfigError(
            f"{run_dir}: the data has changed since {checkpoint.name} was saved, so the run cannot go on as it began. "
            "Restore the data, train on the new under another name=, or go on all the same with resume_allow=[data]."
        )


def check_start(config: TrainConfig, run_dir: Path, checkpoint: Path, start: str) -> None:
    """Raise ConfigError if the weights that the run began with, which its checkpoints do not hold, are others now."""
    if read_manifest(checkpoint)["start_fingerprint"] != start and "model" not in config.resume_allow:
        raise ConfigError(
            f"{run_dir}: the weights it started from ({config.init_from or config.model.path or config.model.hub_id}) "
            f"have changed since {checkpoint.name} was saved. Restore them, begin anew under another name=, or go on "
            "all the same with resume_allow=[model]."
        )
