"""The micro-batches of one rank: the same global batches for any number of ranks, every row once an epoch.

Accelerate alone deals micro-batches to ranks in turn and repeats rows at the end of an epoch (accelerate 1.15).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler

from llmkit.data.encoding.batches import IGNORED
from llmkit.training.balance import deal


class StepBatches(Sampler[list[int]]):
    """Row numbers of one rank's micro-batches, those of one optimizer step after those of the one before.

    A step trains on the next `micro_batch` x `accumulation` x `ranks` rows of a random order, which depends on seed and
    epoch alone; the last step of an epoch on what is left. The list is empty where a rank has nothing left to do.

    Args:
        lengths: tokens of each row of the dataset, (rows,).
    """

    def __init__(
        self, lengths: np.ndarray, *, micro_batch: int, accumulation: int, seed: int, rank: int = 0, ranks: int = 1
    ):
        self.lengths, self.micro_batch, self.accumulation = lengths, micro_batch, accumulation
        self.seed, self.rank, self.ranks, self.epoch = seed, rank, ranks, 0

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be of this epoch; Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of an epoch, as many on every rank."""
        together = self.micro_batch * self.ranks
        steps, left = divmod(len(self.lengths), together * self.accumulation)
        return steps * self.accumulation + math.ceil(left / together)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.global_batches():
            for batches in deal(self.lengths[rows], micro_batch=self.micro_batch, ranks=self.ranks):
                yield rows[batches[self.rank]].tolist()

    def global_batches(self) -> Iterator[np.ndarray]:
        """The rows of each step of the epoch, (rows,): in the order that Accelerate's SeedableRandomSampler gives."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        size = self.micro_batch * self.accumulation * self.ranks
        for start in range(0, len(order), size):
            yield order[start : start + size]


class EvaluationBatches(Sampler[list[int]]):
    """Row numbers of one rank's batches of an evaluation: rows of like length together, the longest first.

    The list is empty where a rank has nothing left to do.
    """

    def __init__(self, lengths: np.ndarray, *, batch_size: int, rank: int = 0, ranks: int = 1):
        self.lengths, self.together, self.rank, self.ranks = lengths, batch_size * ranks, rank, ranks

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.together)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), self.together):
            yield order[start : start + self.together][self.rank :: self.ranks].tolist()


class Blank(dict[str, Any]):
    """A batch that nothing is learnt or measured from: with it a rank keeps step with others that have rows left."""


def rank_loader(
    dataset: datasets.Dataset,
    batches: Sampler[list[int]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    device: torch.device,
    pin_memory: bool,
    generator: torch.Generator | None = None,
) -> DataLoader:
    """Loads one rank's batches to its device; those without a row become Blank.

    Args:
        generator: what it draws its workers' seed from, at each pass; None: torch's numbers on the CPU.
    """

    def collate_or_blank(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(rows) if rows else Blank(collate([_blank_row(dataset[0])]))

    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate_or_blank, pin_memory=pin_memory, generator=generator
    )
    # For Accelerate there is one process: the sampler knows of the others.
    return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)


def _blank_row(row: dict[str, Any]) -> dict[str, Any]:
    """The first tokens of a row, none of them to be learnt."""
    few = {name: value[:2] if isinstance(value, list) else value for name, value in row.items()}
    if "labels" in few:
        few["labels"] = [IGNORED] * len(few["labels"])
    if "seq_lengths" in few:
        few["seq_lengths"] = [len(few["input_ids"])]
    return few
