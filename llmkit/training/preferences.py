"""How often the policy itself finds the chosen answer likelier than the rejected one.

TRL's reward accuracy asks how far both have moved from the reference: it is 0 before the first step by construction.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import nn


def preference_accuracy(trainer: Any, dataset: datasets.Dataset, count: int) -> float | None:
    """The share of the first `count` pairs whose chosen completion has the higher log-probability; None of no pairs."""
    if not (right := preferred(trainer, dataset, count)):
        return None
    return sum(right) / len(right)


def preferred(trainer: Any, dataset: datasets.Dataset, count: int) -> list[bool]:
    """Of each of the first `count` pairs, whether log p(chosen | prompt) > log p(rejected | prompt)."""
    right: list[bool] = []
    with evaluating(trainer.model):
        first = dataset.select(range(min(count, len(dataset))))
        for batch in batches(trainer, first, trainer.args.per_device_eval_batch_size):
            chosen, rejected = log_probs(trainer, batch).chunk(2)
            right += (chosen > rejected).tolist()
    return right


def log_probs(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed log-probability of each completion of a batch under the policy, (sequences,), in nats."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with trainer.compute_loss_context_manager():  # the arithmetic of training
        output = trainer.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,  # TRL's: log-probabilities of the labels without logits of the vocabulary
        )
    return output.log_probs.float().sum(dim=1)


def batches(trainer: Any, dataset: datasets.Dataset, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The pairs in order, `size` at a time, collated and on the trainer's device."""
    for start in range(0, len(dataset), size):
        rows = dataset.select(range(start, min(start + size, len(dataset))))
        yield trainer._prepare_inputs(trainer.data_collator(list(rows)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
