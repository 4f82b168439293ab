"""What the processes of one run agree on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Each flag as it is on some rank, the same on all: ranks that stop at different steps wait for one another."""
    if not _several():
        return list(flags)
    together = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]


def of_each_rank(count: int, *, device: torch.device) -> list[int]:
    """The counts of all ranks, in their order."""
    if not _several():
        return [count]
    counts = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=device)
    counts[torch.distributed.get_rank()] = count
    torch.distributed.all_reduce(counts)
    return counts.tolist()


@contextmanager
def gathering_uneven(accelerator: Any, counts: list[int]) -> Iterator[None]:
    """Within the block `accelerator.gather` takes one value, or `counts[rank]` of them, from each rank.

    Otherwise all have to give as many (accelerate 1.15). What a rank with a count of 0 gives counts as zero.
    """
    if len(counts) == 1:
        yield
        return
    gather, own = accelerator.gather, counts[accelerator.process_index]

    def gather_uneven(values: torch.Tensor) -> torch.Tensor:
        if not own:
            values = torch.zeros_like(values)
        if values.ndim == 0:
            return gather(values)
        even = torch.nn.functional.pad(values, (0, max(counts) - len(values)))
        rows = gather(even).view(len(counts), -1)
        return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])

    accelerator.gather = gather_uneven
    try:
        yield
    finally:
        del accelerator.gather


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
