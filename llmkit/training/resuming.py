"""Going on with a run: which checkpoint, whether it may, and the run's own files as they were at its step."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from llmkit import durable, rundir
from llmkit.config import TrainConfig
from llmkit.errors import ConfigError
from llmkit.training.checkpoints import manifest
from llmkit.training.console import RunConsole
from llmkit.training.versions import versions

# Of the run directory, as they were at the step of the checkpoint.
RECORDS = (rundir.CONFIG, rundir.METRICS, rundir.SAMPLES)
BEST_WEIGHTS = "best.safetensors"  # in a checkpoint; see callbacks.BestWeights


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


def restore_records(run_dir: Path, checkpoint: Path) -> None:
    """Give the run the metrics, samples and best weights that it had at the checkpoint's step."""
    for name in (rundir.METRICS, rundir.SAMPLES):
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)
    best = run_dir / rundir.BEST_WEIGHTS
    best.unlink(missing_ok=True)
    if (checkpoint / BEST_WEIGHTS).exists():
        durable.second_name(checkpoint / BEST_WEIGHTS, best)


def records(run_dir: Path) -> dict[str, Any]:
    """What of the run directory goes into a checkpoint: file name -> text, or the file."""
    kept: dict[str, Any] = {
        name: (run_dir / name).read_text(encoding="utf-8") for name in RECORDS if (run_dir / name).exists()
    }
    if (run_dir / rundir.BEST_WEIGHTS).exists():
        kept[BEST_WEIGHTS] = run_dir / rundir.BEST_WEIGHTS
    return kept


def facts(config: TrainConfig, run_dir: Path, **more: Any) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run."""
    settings = (run_dir / rundir.CONFIG).read_bytes()
    return {
        "world_size": config.hardware.num_processes * config.hardware.num_nodes,
        "config_hash": hashlib.sha256(settings).hexdigest(),
        "versions": versions(),
        **more,
    }
