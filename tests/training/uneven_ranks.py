"""One rank of small trainings on rows of very different lengths: what torchrun starts in test_balance.py.

    python -m torch.distributed.run --nproc-per-node 2 tests/training/uneven_ranks.py FOLDER

Each rank leaves `<case>-<rank>.json` in FOLDER: what was logged for each case, and of a run that was stopped within the
second epoch and went on.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from recipe_trainers import make_trainer, random_pairs, random_rows
from train_config import config_of
from transformers import TrainerCallback

from llmkit.processes import die_with_parent
from llmkit.training.callbacks import Saving
from llmkit.training.checkpoints import manifest
from llmkit.training.stopping import StopRequest

# 21 and 7 divide by none of the global batches.
LENGTHS = [6, 90, 9, 25, 14, 120, 31, 18, 50, 11, 22, 35, 7, 64, 12, 28, 100, 8, 41, 16, 55]
HELD_OUT = [20, 73, 8, 41, 12, 27, 110]
WORDS = (
    *("model=tiny", "data=demo", "method=lora", "hardware=cpu", "precision=fp32", "training.eval_steps=2"),
    *("training.max_steps=null", "training.num_train_epochs=2", "training.logging_steps=1", "training.warmup_steps=0"),
)
# Recipe, micro-batch of one process, accumulation of both. Two ranks have half the micro-batch; the last step of an
# epoch has 5 of 8 rows or 1 of 4, which leaves the second rank with none.
CASES = {
    "sft, 5 of 8 left": ("sft", 4, 2),
    "sft, 1 of 4 left": ("sft", 2, 2),
    "sft, 5 of 8 left, one micro-batch": ("sft", 8, 1),
    "dpo, 5 of 8 left": ("dpo", 4, 2),
    "dpo, 1 of 4 left": ("dpo", 2, 2),
}
STOPPED, STOPPED_AT = "sft, stopped within the second epoch", 9


class StopAt(TrainerCallback):
    """Saves a step and ends there."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def train(folder: Path, name: str, case: tuple[str, int, int], ranks: int, *, stop_at: int = 0) -> list[dict[str, Any]]:
    """What a training logs, timings aside; with `stop_at` it ends there, and a second one goes on."""
    recipe, micro_batch, accumulation = case
    config = config_of(
        *(f"recipe={recipe}", *WORDS, f"training.gradient_accumulation_steps={accumulation}"),
        f"training.per_device_train_batch_size={micro_batch // ranks}",
        "training.per_device_eval_batch_size=2",
    )
    run_dir = folder / name
    data = random_rows(LENGTHS), random_rows(HELD_OUT, seed=1)
    if recipe == "dpo":
        data = _pairs(LENGTHS, seed=0), _pairs(HELD_OUT, seed=1)
    for step in [stop_at, 0] if stop_at else [0]:
        trainer = make_trainer(config, run_dir, *data, eval_strategy="steps", eval_on_start=True)
        checkpoint = manifest.latest(run_dir)
        trainer.facts = lambda: {"evaluation_pending": False}
        trainer.add_callback(Saving(trainer, StopRequest(), checkpoint=checkpoint, minutes=None))
        trainer.add_callback(StopAt(step))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.writer.wait()
        trainer.accelerator.wait_for_everyone()
    timed = ("runtime", "per_second", "model_preparation_time")
    history = [record for record in trainer.state.log_history if "train_loss" not in record]  # Trainer's summary
    return [{key: value for key, value in record.items() if not key.endswith(timed)} for record in history]


def _pairs(lengths: list[int], *, seed: int) -> Any:
    return random_pairs([(5, length, 126 - length) for length in lengths], seed=seed)


def train_all(folder: Path, *, rank: int = 0, ranks: int = 1) -> None:
    """Run all cases and write what they log."""
    for name, case in CASES.items():
        (folder / f"{name}-{rank}.json").write_text(json.dumps(train(folder, name, case, ranks)), encoding="utf-8")
    went_on = train(folder, STOPPED, CASES["sft, 1 of 4 left"], ranks, stop_at=STOPPED_AT)
    (folder / f"{STOPPED}-{rank}.json").write_text(json.dumps(went_on), encoding="utf-8")


if __name__ == "__main__":
    die_with_parent(os.getppid(), signal.SIGKILL)
    train_all(Path(sys.argv[1]), rank=int(os.environ["RANK"]), ranks=int(os.environ["WORLD_SIZE"]))
