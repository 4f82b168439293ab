"""Trackers get copies of what the run directory holds. W&B: online with a key, offline without one; never a prompt."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.config.schema import TrainConfig
from llmkit.training.generation import Answer
from llmkit.training.wandb_key import wandb_key_place

CONNECT_SECONDS = 20  # how long a run waits for W&B before it goes on offline


class NoTracker:
    """The interface of a tracker, doing nothing."""

    where: str | None = None  # what a user opens to see the run
    run_id: str | None = None  # by which a run that goes on stays one run

    def log(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""

    def samples(self, step: int, answers: Sequence[Answer]) -> None:
        """The sample answers at a step."""

    def finish(self, *, plots: Sequence[Path], summary: dict[str, Any], failed: bool) -> None:
        """The run is over."""


class WandbTracker(NoTracker):
    """Weights & Biases; `run_id` goes on with an earlier run of that id."""

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str | None = None):
        # Names the W&B service of whoever started us, a notebook say: a run handed to it may never reach the disk.
        os.environ.pop("WANDB_SERVICE", None)
        import wandb

        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key_place() else "offline")
        try:
            self._run = self._start(config, run_dir, mode, run_id)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            reason = str(error).splitlines()[0]
            print(f"warning: W&B cannot be reached ({reason}); the run is kept offline.", file=sys.stderr, flush=True)
            self._run = self._start(config, run_dir, "offline", run_id)
        self.run_id = self._run.id
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._table: list[list[Any]] = []
        folder = Path(self._run.dir).parent
        self.where = self._run.url or f"offline in {folder}; upload it with: wandb sync {folder}"

    def _start(self, config: TrainConfig, run_dir: Path, mode: Any, run_id: str | None) -> Any:
        tracking = config.tracking
        return self._wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            name=tracking.run_name or run_dir.name,
            tags=tracking.tags,
            config=dataclasses.asdict(config),
            dir=str(run_dir),
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                x_disable_machine_info=True,
                disable_git=True,
                init_timeout=CONNECT_SECONDS,
                reinit="create_new",  # a process may hold several runs (launcher=packed)
            ),
        )

    def log(self, record: dict[str, Any]) -> None:
        self._run.log(record)

    def samples(self, step: int, answers: Sequence[Answer]) -> None:
        self._table += [[step, answer.prompt, answer.answer, answer.expected] for answer in answers]
        # Sent whole each time: a W&B table cannot grow.
        table = self._wandb.Table(columns=["step", "prompt", "answer", "expected"], data=self._table)
        self._run.log({"samples": table, "step": step})

    def finish(self, *, plots: Sequence[Path], summary: dict[str, Any], failed: bool) -> None:
        for plot in plots:
            self._run.log({f"{plot.stem}_plot": self._wandb.Image(str(plot))})
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(failed))


def start_tracker(config: TrainConfig, run_dir: Path, run_id: str | None = None) -> NoTracker:
    """The tracker that `tracking` names; `run_id` is that of the run that goes on."""
    return WandbTracker(config, run_dir, run_id) if config.tracking.name == "wandb" else NoTracker()
