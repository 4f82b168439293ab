"""One rank of a small training that goes on from the newest checkpoint: what torchrun starts in rank_trials.py.

    python -m torch.distributed.run --nproc-per-node 2 tests/training/two_ranks.py RUN_DIR

RUN_DIR holds the run's config.yaml. In the folder around it a rank leaves `rank-<n>.pid` once it heeds signals and
`rank-<n>.json` when it has ended: at which step, with which exit code, and what it knew of a signal. Rank 0 writes to
`events`, one word a line, what it is about: `step`, `evaluation` (at each batch) or `save` (before each file).
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llmkit.config import load
from llmkit.worker import hide_unused_libraries

if __name__ == "__main__":  # as in a worker, before they are imported
    hide_unused_libraries(load(Path(sys.argv[1])))

from recipe_trainers import make_trainer, random_rows
from transformers import TrainerCallback

from llmkit import durable
from llmkit.errors import EXIT_DONE, EXIT_PREEMPTED, Stopped
from llmkit.processes import die_with_parent
from llmkit.training.callbacks import Saving
from llmkit.training.checkpoints import manifest, saving
from llmkit.training.stopping import StopRequest

EVENTS = "events"
# So long is each batch of an evaluation and each file of a save, that a signal may come while it is under way.
BATCH_SECONDS, FILE_SECONDS = 0.05, 0.02
TRAINED = [6, 40, 9, 25, 14, 60, 31, 18, 50, 11, 22, 35]  # lengths of rows, in tokens
HELD_OUT = [20, 33, 8, 41, 12, 27] * 4


class Events:
    """What this rank is about, for those who watch; only rank 0 tells."""

    def __init__(self, file: Path, *, tells: bool):
        self._file = file.open("a", encoding="utf-8", buffering=1) if tells else None

    def tell(self, word: str) -> None:
        if self._file:
            self._file.write(f"{word}\n")


class Telling(TrainerCallback):
    """Tells of steps and evaluations, and takes its time over the latter."""

    def __init__(self, events: Events):
        self.events = events

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.tell("step")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.tell("evaluation")
        time.sleep(BATCH_SECONDS)


def save_slowly(events: Events) -> None:
    """Have the files of a checkpoint written as a large model's are: so slowly that much happens meanwhile."""
    write_file = saving._write_file

    def write(path: Path, value: Any) -> None:
        events.tell("save")
        time.sleep(FILE_SECONDS)
        write_file(path, value)

    saving._write_file = write


def main(run_dir: Path) -> int:
    """Train to the end or to a stop; returns the exit code of the contract."""
    die_with_parent(os.getppid(), signal.SIGKILL)
    rank, folder = int(os.environ["RANK"]), run_dir.parent
    stop = StopRequest().watch()
    durable.write_text(folder / f"rank-{rank}.pid", str(os.getpid()))

    trainer = make_trainer(load(run_dir), run_dir, random_rows(TRAINED), random_rows(HELD_OUT), eval_strategy="steps")
    checkpoint = manifest.latest(run_dir)
    trainer.stop = stop
    trainer.writer = saving.CheckpointWriter(run_dir, keep=1, warn=print)
    trainer.facts = lambda: {
        "world_size": trainer.args.world_size,
        "evaluation_pending": trainer.evaluation_pending,
    }
    trainer.add_callback(Saving(trainer, stop, checkpoint=checkpoint, minutes=None))
    events = Events(folder / EVENTS, tells=rank == 0)
    trainer.add_callback(Telling(events))
    save_slowly(events)

    # What stops an evaluation that is made up for leaves nothing to save: the checkpoint still asks for it.
    with contextlib.suppress(Stopped):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.writer.wait()
    # torchrun ends all ranks as soon as one ends with an exit code other than 0.
    trainer.accelerator.wait_for_everyone()
    state = trainer.state
    code = EXIT_PREEMPTED if state.global_step < state.max_steps else EXIT_DONE
    ended = {"step": state.global_step, "exit_code": code, "signal": stop.signal}
    durable.write_text(folder / f"rank-{rank}.json", json.dumps(ended) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
