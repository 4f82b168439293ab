"""What the processes of one run agree on."""

import torch


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Each flag as it is on some rank, the same on all: ranks that stop at different steps wait for one another."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(flags)
    together = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]
