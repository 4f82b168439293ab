"""What the rows of `data.test` say of the model to be delivered: measured once, each figure with its 95% interval.

The interval says how far the figure may be off because these rows were drawn and not others. Rows are drawn and tokens
come with them, so rows are the unit (arXiv 2411.00640).
"""

from dataclasses import asdict
from typing import Any

import datasets
import numpy as np
import torch

from llmkit.data.encoding.batches import IGNORED
from llmkit.data.prepare import Split
from llmkit.training.estimate import ratio, share
from llmkit.training.figures import questions
from llmkit.training.generation import AnswerGenerator
from llmkit.training.preferences import batches, evaluating, preferred


def measure_test(trainer: Any, split: Split, generator: AnswerGenerator, *, examples: int) -> dict[str, dict[str, Any]]:
    """Figure -> value, low, high and n, as result.json keeps them.

    Of conversations: `loss` in nats per learnt token over all rows, and `exact_match` over the first `examples` of them
    (0: none), since answers take long to generate. Of pairs: `preference_accuracy` over all.
    """
    if "prompt_ids" in split.dataset.column_names:
        right = preferred(trainer, split.dataset, len(split.dataset))
        return {"preference_accuracy": asdict(share(sum(right), len(right)))}
    sums, counts = row_losses(trainer, split.dataset)
    figures = {"loss": ratio(by_row(sums, split.origins), by_row(counts, split.origins))}
    if asked := questions(split, examples):
        matches = [answer.matches for answer in generator.answer(asked)]
        rows = len(np.unique(split.origins[:examples]))
        figures["exact_match"] = share(sum(matches), len(matches), rows=min(rows, len(matches)))
    return {name: asdict(estimate) for name, estimate in figures.items()}


def by_row(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """`values` of examples summed up over those of one row: rows are drawn, their parts (on_overlong=split) are not."""
    _, row = np.unique(origins, return_inverse=True)
    return np.bincount(row, weights=values)


def row_losses(trainer: Any, dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the summed loss in nats and the number of learnt tokens it is summed over.

    With several processes each measures all rows: this happens once, and no batch has to be made even.
    """
    found: list[torch.Tensor] = []
    with evaluating(trainer.model), trainer.accelerator.autocast():
        for inputs in batches(trainer, dataset, trainer.args.per_device_eval_batch_size):
            # TRL's head gives log-probabilities without the logits of the whole vocabulary, 0 where nothing is learnt.
            output = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
            found.append(sums_of_rows(output.log_probs, inputs).cpu())
    sums, counts = torch.cat(found, dim=1).numpy()
    return sums, counts


def sums_of_rows(log_probs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each row of a batch the summed loss in nats and how many learnt tokens it is summed over, (2, rows)."""
    learnt = inputs["labels"][:, 1:] != IGNORED
    return torch.stack([_per_row(values.double(), inputs) for values in (-log_probs, learnt)])


def _per_row(values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums over the rows of a batch of what belongs to each token but the first, (rows, tokens - 1)."""
    if "attention_mask" in inputs:
        return values.sum(dim=1)
    # Without padding all rows lie in one sequence, and positions start from 0 in each.
    row = (inputs["position_ids"][0] == 0).cumsum(0) - 1
    return values.new_zeros(int(row[-1]) + 1).index_add(0, row[1:], values[0])
