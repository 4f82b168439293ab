"""The GPUs that a run works on, how busy and how full they are, as NVML says. Nothing where there is no NVML."""

import functools
from typing import Any

GIB = 2**30


def devices_of(process: int) -> str | None:
    """`GPU 0: 93%, 31 of 80 GiB` for each GPU that a process of this machine, or one it has started, computes on.

    None if there is no NVIDIA driver here, nvidia-ml-py is not installed, or the process uses no GPU.
    """
    nvml = _nvml()
    if nvml is None:
        return None
    import psutil

    try:
        parent = psutil.Process(process)
        family = {process, *(child.pid for child in parent.children(recursive=True))}
    except psutil.Error:
        return None
    found = []
    for number in range(nvml.nvmlDeviceGetCount()):
        device = nvml.nvmlDeviceGetHandleByIndex(number)
        try:
            users = {one.pid for one in nvml.nvmlDeviceGetComputeRunningProcesses(device)}
            if users & family:
                busy, memory = nvml.nvmlDeviceGetUtilizationRates(device), nvml.nvmlDeviceGetMemoryInfo(device)
                found.append(f"GPU {number}: {busy.gpu}%, {memory.used / GIB:.0f} of {memory.total / GIB:.0f} GiB")
        except nvml.NVMLError:
            continue
    return "; ".join(found) or None


@functools.cache
def _nvml() -> Any:
    """The module of nvidia-ml-py, ready to be asked; None where there is no such thing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
