"""Runs the longest batches of a trainer under one setting or another, without an update, and measures their memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from llmkit.config import TrainConfig
from llmkit.training.advice import is_out_of_memory, reason
from llmkit.training.memory import bounded_growth, capacity, in_units, optimizer_state, peak_memory, reset_peak
from llmkit.training.undisturbed import as_in_training, undisturbed


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What decides how much memory a batch takes. Rows are cut to `max_length` tokens; None: as they are."""

    micro_batch: int
    accumulation: int
    eval_batch: int
    checkpointing: bool
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a batch of `rows` x `tokens` took.

    `peak` is in bytes without, `needed` with the optimizer's state. `problem` says why it did not fit; None: it did.
    """

    name: str
    rows: int
    tokens: int
    peak: int
    needed: int
    problem: str | None

    def __str__(self) -> str:
        return f"{self.name} ({self.rows} x {self.tokens:,} tokens)"


class LongestBatches:
    """The longest batches of one trainer."""

    def __init__(self, trainer: Any, config: TrainConfig):
        self.trainer, self.config = trainer, config
        self.device: torch.device = trainer.args.device
        self.capacity = capacity(config, self.device)
        self.state = optimizer_state(config.training.optim, trainer.model.parameters())
        self.asked = Setting(
            micro_batch=trainer.args.per_device_train_batch_size,
            accumulation=trainer.args.gradient_accumulation_steps,
            eval_batch=trainer.args.per_device_eval_batch_size,
            checkpointing=trainer.args.gradient_checkpointing,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest row, packed or not."""
        return max(int(row_lengths(dataset).max()) for dataset in self._datasets)

    def count_longer(self, length: int) -> tuple[int, int]:
        """How many examples are longer than that, and how many there are."""
        lengths = np.concatenate([example_lengths(dataset) for dataset in self._datasets])
        return int((lengths > length).sum()), len(lengths)

    @property
    def _datasets(self) -> list[datasets.Dataset]:
        both = (self.trainer.train_dataset, self.trainer.eval_dataset)
        return [dataset for dataset in both if dataset is not None]

    def with_micro_batch(self, size: int) -> Setting:
        """What was asked for, with another micro-batch at the same number of examples per step."""
        examples = self.asked.micro_batch * self.asked.accumulation
        return replace(self.asked, micro_batch=size, accumulation=examples // size)

    def train(self, setting: Setting) -> Outcome:
        """Forward and backward of the longest micro-batch."""
        trainer = self.trainer
        rows = longest_rows(trainer, trainer.train_dataset, setting.micro_batch, setting.max_length)

        def step() -> None:
            if setting.accumulation > 1:  # the gradients of the micro-batches before this one are there already
                for parameter in trainer.model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            trainer.current_gradient_accumulation_steps = setting.accumulation
            inputs = trainer.data_collator(rows)
            items = trainer._get_num_items_in_batch([inputs], self.device)
            trainer.training_step(trainer.model, inputs, items)

        return self._run("longest training batch", rows, step, checkpointing=setting.checkpointing)

    def evaluate(self, setting: Setting) -> Outcome:
        """The longest batch of an evaluation."""
        trainer = self.trainer
        rows = longest_rows(trainer, trainer.eval_dataset, setting.eval_batch, setting.max_length)

        def step() -> None:
            trainer.model.eval()
            trainer.prediction_step(trainer.model, trainer.data_collator(rows), prediction_loss_only=True)

        return self._run("longest evaluation batch", rows, step, checkpointing=setting.checkpointing)

    def run(self, setting: Setting) -> list[Outcome]:
        """Both, or the first alone where there is nothing to evaluate on."""
        return [self.train(setting), *([] if self.trainer.eval_dataset is None else [self.evaluate(setting)])]

    def _run(self, name: str, rows: list[dict[str, Any]], step: Callable[[], None], *, checkpointing: bool) -> Outcome:
        reset_peak(self.device)
        on_gpu = self.device.type == "cuda"
        problem = None
        limited, prepared = bounded_growth(self.device), as_in_training(self.trainer, checkpointing=checkpointing)
        try:
            with undisturbed(self.trainer), limited, prepared:
                # Stands in for the optimizer's state, which is there from the second step on. On a CPU memory that
                # nobody writes to is promised but not used.
                state = torch.empty(self.state, dtype=torch.uint8, device=self.device)
                step()
                del state
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = reason(error)
        peak = peak_memory(self.device) - (self.state if on_gpu else 0)
        needed = peak + self.state
        if problem is None and needed > self.capacity:
            problem = f"it needs {in_units(needed)}"
        tokens = max(map(_tokens, rows))
        return Outcome(name=name, rows=len(rows), tokens=tokens, peak=peak, needed=needed, problem=problem)


def row_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Tokens of each row, of a pair those of its longer side; read from Arrow's offsets, without the tokens."""

    def lengths(column: str) -> np.ndarray:
        return pc.list_value_length(dataset.data.column(column)).to_numpy()

    if "input_ids" in dataset.column_names:
        found = lengths("input_ids")
    else:
        found = lengths("prompt_ids") + np.maximum(lengths("chosen_ids"), lengths("rejected_ids"))
    # `select` leaves the table as it was and keeps the chosen indices beside it.
    return found if dataset._indices is None else found[dataset._indices.column(0).to_numpy()]


def example_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Tokens of each example, also of those that share a packed row."""
    if "seq_lengths" not in dataset.column_names:
        return row_lengths(dataset)
    return pc.list_flatten(dataset.data.column("seq_lengths")).to_numpy()


def longest_rows(
    trainer: Any, dataset: datasets.Dataset, count: int, max_length: int | None = None
) -> list[dict[str, Any]]:
    """The `count` longest rows as the collator takes them, cut to `max_length` tokens."""
    order = np.argsort(-row_lengths(dataset), kind="stable")[:count]
    rows = trainer._remove_unused_columns(dataset)
    return [_cut(rows[int(index)], max_length) for index in order]


def _tokens(row: dict[str, Any]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _cut(row: dict[str, Any], length: int | None) -> dict[str, Any]:
    """The row as it might be under a shorter data.max_length; only its size matters."""
    if length is None or _tokens(row) <= length:
        return row
    row = dict(row)
    if "prompt_ids" in row:
        answer = min(max(len(row["chosen_ids"]), len(row["rejected_ids"])), length - 1)
        parts = {"prompt_ids": length - answer, "chosen_ids": answer, "rejected_ids": answer}
    else:
        parts = {"input_ids": length, "labels": length}
    if "seq_lengths" in row:
        ends = np.minimum(np.cumsum(row["seq_lengths"]), length)
        row["seq_lengths"] = [int(size) for size in np.diff(ends, prepend=0) if size]
    return row | {name: row[name][:size] for name, size in parts.items()}
