"""How much memory a device has, how much was in use at most, and what the optimizer will still ask for."""

import ctypes
import gc
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from llmkit.config import TrainConfig
from llmkit.host_memory import sizes_in

GIB = 2**30

# Numbers an optimizer keeps for each trained one, by the start of its name; others are of AdamW's kind and keep two.
# Those with factored or low-rank state keep next to nothing; paged ones keep theirs in host memory.
STATE_PER_PARAMETER = {
    "paged": 0,
    "sgd": 0,
    "lomo": 0,
    "adalomo": 0,
    "adafactor": 0,
    "galore": 0,
    "apollo": 0,
    "schedule_free_sgd": 1,
    "adagrad": 1,
    "lion": 1,
    "rmsprop": 1,
    "ademamix": 3,
}
SMALLEST_IN_8_BITS = 4096  # elements; bitsandbytes keeps the state of smaller tensors in float32
ALWAYS_FLOAT32 = (
    "32bit",
    "bnb",
    "ademamix",
)  # in the names of bitsandbytes' optimizers; others take the weight's dtype


def in_units(size: int) -> str:
    """A number of bytes as `1.5 GiB` or `4 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def capacity(config: TrainConfig, device: torch.device) -> int:
    """Bytes the run may use: those of the device, or fewer where the process or hardware.memory_gib is limited."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        there = int(total * torch.cuda.get_per_process_memory_fraction(device))
    else:
        limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Processes of one machine share its memory.
        there = min([physical, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
        there //= config.hardware.num_processes
    limit = config.hardware.memory_gib
    return there if limit is None else min(there, int(limit * GIB))


def optimizer_state(optim: str, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that the optimizer called `optim` (Transformers' name) keeps for the trained ones among `parameters`."""
    kept = next((count for name, count in STATE_PER_PARAMETER.items() if optim.startswith(name)), 2)

    def size(parameter: torch.Tensor) -> int:
        if "8bit" in optim:
            return 1 if parameter.numel() >= SMALLEST_IN_8_BITS else 4
        return 4 if any(word in optim for word in ALWAYS_FLOAT32) else parameter.element_size()

    return sum(kept * size(p) * p.numel() for p in parameters if p.requires_grad)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since the last `reset_peak`: of the GPU by tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: of the GPU by tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return sizes_in("/proc/self/status").get("VmRSS", 0)


def reset_peak(device: torch.device) -> None:
    """Free what nobody holds, and measure the peak from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(AttributeError):  # glibc keeps what is freed, and large blocks too once it has seen some
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # where it is not allowed, the peak stays that of the whole process: never too low
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the high-water mark


@contextmanager
def bounded_growth(device: torch.device) -> Iterator[None]:
    """On a CPU, let an allocation fail where the kernel would later kill the process, which then could say nothing.

    Linux promises more memory than it has. Within the block this process may ask for what is available now.
    """
    own, machine = sizes_in("/proc/self/status"), sizes_in("/proc/meminfo")
    if device.type != "cpu" or "VmData" not in own or "MemAvailable" not in machine:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = own["VmData"] + machine["MemAvailable"] + machine.get("SwapFree", 0)
    bounds = [bound for bound in (soft, hard, limit) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
