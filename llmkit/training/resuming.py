"""Whether a run may go on: from which checkpoint, on the data and from the weights that it began with."""

from pathlib import Path

from llmkit.config import TrainConfig
from llmkit.errors import ConfigError
from llmkit.training.checkpoints import manifest
from llmkit.training.console import RunConsole


def find_checkpoint(config: TrainConfig, run_dir: Path, fingerprint: str, console: RunConsole) -> Path | None:
    """The newest checkpoint that is whole, byte for byte; None to start from the beginning.

    A damaged one is set aside with a warning. Raises ConfigError if the newest was trained on other data.
    """
    manifest.remove_leftovers(run_dir)
    while (checkpoint := manifest.latest(run_dir)) is not None:
        try:
            manifest.verify(checkpoint)
        except manifest.DamagedCheckpoint as error:
            console.warn(f"{error}; it is left in {manifest.set_aside(checkpoint).name}, and the one before is taken.")
            continue
        _check_data(config, run_dir, checkpoint, fingerprint)
        return checkpoint
    return None


def _check_data(config: TrainConfig, run_dir: Path, checkpoint: Path, fingerprint: str) -> None:
    seen = manifest.read_manifest(checkpoint)["dataset_fingerprint"]
    if seen != fingerprint and "data" not in config.resume_allow:
        raise ConfigError(
            f"{run_dir}: the data has changed since {checkpoint.name} was saved, so the run cannot go on as it began. "
            "Restore the data, train on the new under another name=, or go on all the same with resume_allow=[data]."
        )


def check_start(config: TrainConfig, run_dir: Path, checkpoint: Path, start: str) -> None:
    """Raise ConfigError if the weights that the run began with, which its checkpoints do not hold, are others now."""
    if manifest.read_manifest(checkpoint)["start_fingerprint"] != start and "model" not in config.resume_allow:
        raise ConfigError(
            f"{run_dir}: the weights it started from ({config.init_from or config.model.path or config.model.hub_id}) "
            f"have changed since {checkpoint.name} was saved. Restore them, begin anew under another name=, or go on "
            "all the same with resume_allow=[model]."
        )
