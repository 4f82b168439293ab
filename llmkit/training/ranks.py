"""The processes (ranks) of one run: who they are, what they agree on, and what only one of them does.

Without a process group all of this is for free, and every call does what it says for the one process there is.
"""

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from llmkit.config import TrainConfig

T = TypeVar("T")

# One rank prepares data and fetches models for all, who wait. The group that trains waits far shorter: there, it hangs.
PREPARATION = datetime.timedelta(hours=24)

_control: Any = None  # a group on the CPU, beside the one that trains


def join(device: str) -> None:
    """Become a rank of the group that torchrun has started this process for; `device` is cpu or cuda."""
    global _control
    if device == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
        distributed.init_process_group("nccl", device_id=local)
    else:
        distributed.init_process_group("gloo")
    _control = distributed.new_group(backend="gloo", timeout=PREPARATION)


def leave() -> None:
    """Leave the group, if there is one; the ranks that train need no warning of it."""
    global _control
    if _together():
        _control = None
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process among those of the run, from 0."""
    return distributed.get_rank() if _together() else 0


def is_main() -> bool:
    """Whether this is the process that writes what a run leaves behind."""
    return rank() == 0


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Each flag as it is on some rank, the same on all: ranks that stop at different steps wait for one another."""
    if not _together():
        return list(flags)
    together = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(together, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order."""
    if not _together():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_control)
    return values


def of_each_rank(count: int, *, device: torch.device) -> list[int]:
    """The counts of all ranks, in their order."""
    if not _together():
        return [count]
    counts = torch.zeros(distributed.get_world_size(), dtype=torch.int64, device=device)
    counts[distributed.get_rank()] = count
    distributed.all_reduce(counts)
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


def spread(tensor: torch.Tensor) -> None:
    """Make `tensor` what it is on the main rank, in place."""
    if _together():
        distributed.broadcast(tensor, src=0)


def on_main(make: Callable[[], T]) -> T:
    """What `make` returns on the main rank, on every rank. What it raises there is raised on all."""
    if not _together():
        return make()
    said: list[Any] = [None, None]
    if is_main():
        try:
            said[0] = make()
        except Exception as error:
            said[1] = error
    distributed.broadcast_object_list(said, src=0, group=_control)
    if said[1] is not None:
        raise said[1]
    return said[0]


def first_of_machine(make: Callable[[], T]) -> T:
    """`make` on one rank of each machine and then on the others, who find in a cache what it left there.

    What it raises on one of the first is raised on all.
    """
    if not _together():
        return make()
    result, error = None, None
    first = os.environ["LOCAL_RANK"] == "0"
    if first:
        try:
            result = make()
        except Exception as raised:
            error = raised
    for one in gathered(error):
        if one is not None:
            raise one
    return result if first else make()  # type: ignore[return-value]


def agree(config: TrainConfig) -> None:
    """Make `config` what it is on the main rank, in place: that is the one that is written and compared."""
    main = on_main(lambda: config)
    for field in dataclasses.fields(config):
        setattr(config, field.name, getattr(main, field.name))


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
