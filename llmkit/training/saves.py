"""The checkpoints of one run as it trains: what it takes up of an earlier one, those it makes, their copy elsewhere."""

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

from llmkit import durable, rundir
from llmkit.config import TrainConfig
from llmkit.training.callbacks import Saving
from llmkit.training.checkpoints.manifest import read_manifest, step_of
from llmkit.training.checkpoints.mirror import Mirror
from llmkit.training.checkpoints.remote import RemoteRun, run_place
from llmkit.training.checkpoints.saving import CheckpointWriter
from llmkit.training.console import RunConsole
from llmkit.training.engine import engine_in_use
from llmkit.training.metrics import MetricsFile
from llmkit.training.pack.pack import seconds_of_device
from llmkit.training.ranks import is_main
from llmkit.training.ready import Ready
from llmkit.training.stopping import StopRequest
from llmkit.training.tracking import NoTracker
from llmkit.training.versions import versions

# Of the run directory: in a checkpoint as they were at its step.
RECORDS = (rundir.CONFIG, rundir.METRICS, rundir.SAMPLES, rundir.RUNGS)
BEST_WEIGHTS = "best.safetensors"  # in a checkpoint; see callbacks.BestWeights
RENDERING = ".rendering"  # in the run's directory: tokenizer, template and end tokens, linked into every checkpoint


class Saves:
    """Made before the run's files are opened, which it puts back to where they were at the checkpoint.

    Raises StorageError if the run cannot be copied to where it is to be.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, ready: Ready, console: RunConsole):
        self.config, self.run_dir, self.console = config, run_dir, console
        self.origin = ready.checkpoint
        self.earlier = read_manifest(self.origin) if self.origin else {}
        self._fingerprints = {"dataset_fingerprint": ready.data.fingerprint, "start_fingerprint": ready.start}
        self._began = time.monotonic() - self.earlier.get("seconds", 0.0)
        self._mirror: Mirror | None = None
        self._rendering: dict[str, Path] = {}
        place = run_place(config, run_dir) if is_main() else None
        self._remote = None if place is None else RemoteRun(place)
        if self._remote is not None:
            self._remote.claim(run_dir)
        if self.origin is not None and is_main():
            restore_records(run_dir, self.origin)

    @property
    def seconds(self) -> float:
        """How long the run has taken, with what led to the checkpoint it goes on from."""
        return time.monotonic() - self._began

    def device_seconds(self, seconds: float) -> float:
        """Of so many `seconds`, those in which it had its devices for itself: runs that train together share theirs."""
        before = self.earlier.get("seconds", 0.0)
        return self.earlier.get("device_seconds", before) + seconds_of_device(seconds - before)

    @property
    def step(self) -> int:
        """The step that the run goes on from; 0 if it starts."""
        return step_of(self.origin) if self.origin else 0

    def begin(self, trainer: Any, stop: StopRequest, metrics: MetricsFile, tracker: NoTracker) -> None:
        """Have the trainer save when it is time to, and stop, saved, when it is asked to."""
        checkpoint = self.config.checkpoint
        trainer.add_callback(Saving(trainer, stop, checkpoint=self.origin, minutes=checkpoint.minutes))
        trainer.stop = stop
        trainer.writer = CheckpointWriter(self.run_dir, keep=checkpoint.keep, warn=self.console.warn)
        trainer.run_files = lambda: records(self.run_dir) | self._rendering_of(trainer)
        trainer.facts = lambda: self._facts(trainer, metrics, tracker)
        if self._remote is not None:
            self._mirror = Mirror(self._remote, self.run_dir, keep=checkpoint.keep, warn=self.console.warn)
            trainer.writer.committed = self._mirror.offer
            self.console.fact("mirror", self._remote.place.url)

    def end(self) -> None:
        """No more checkpoints come; the worker brings the copy up to date."""
        if self._mirror is not None:
            self._mirror.close()
        if is_main():
            shutil.rmtree(self.run_dir / RENDERING, ignore_errors=True)

    def _rendering_of(self, trainer: Any) -> dict[str, Path]:
        """The files that make a checkpoint one that can be loaded and served like `final/`; written once."""
        if not self._rendering:
            directory = self.run_dir / RENDERING
            shutil.rmtree(directory, ignore_errors=True)
            trainer.processing_class.save_pretrained(directory)
            trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(directory)
            durable.sync_tree(directory)
            self._rendering = {file.name: file for file in directory.iterdir()}
        return self._rendering

    def _facts(self, trainer: Any, metrics: MetricsFile, tracker: NoTracker) -> dict[str, Any]:
        """What the manifest of a checkpoint made now says, beside its files."""
        hardware, seconds = self.config.hardware, self.seconds
        return {
            "world_size": hardware.num_processes * hardware.num_nodes,
            "engine": engine_in_use(trainer),
            "config_hash": hashlib.sha256((self.run_dir / rundir.CONFIG).read_bytes()).hexdigest(),
            **self._fingerprints,
            "seconds": seconds,
            "device_seconds": self.device_seconds(seconds),
            "tracker": tracker.run_id,
            "eval_loss": metrics.eval_loss_at(trainer.state.global_step),
            "evaluation_pending": trainer.evaluation_pending,
            "versions": versions(),
        }


def restore_records(run_dir: Path, checkpoint: Path) -> None:
    """Give the run the metrics, samples and best weights that it had at the checkpoint's step."""
    for name in (rundir.METRICS, rundir.SAMPLES):
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)
    # What was found at a rung since then stays found.
    if (checkpoint / rundir.RUNGS).exists() and not (run_dir / rundir.RUNGS).exists():
        shutil.copyfile(checkpoint / rundir.RUNGS, run_dir / rundir.RUNGS)
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
