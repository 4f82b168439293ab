"""What a test has a warm process fork: `main` does what the first word says and tells of itself on its output."""

import atexit
import ctypes
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

from llmkit import rundir

PR_GET_PDEATHSIG = 2  # prctl(2)


def main(argv: list[str]) -> int:
    """Returns the exit code that the second word says."""
    return {"tell": tell, "talk": talk, "train": train, "end": end, "hold": hold}[argv[0]](*argv[1:])


def tell() -> int:
    """Everything that a process can be asked about itself, before it has done anything."""
    import torch

    from llmkit.processes import stop_with_driver

    before = {
        "imported": [name for name in ("torch", "transformers", "trl", "peft", "datasets") if name in sys.modules],
        "threads": len(os.listdir("/proc/self/task")),
        "open": sorted(os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()),
        "bad_fork": torch._C._cuda_isInBadFork() if hasattr(torch._C, "_cuda_isInBadFork") else False,
        "cuda": torch.cuda.is_initialized(),
        "torch_threads": torch.get_num_threads(),
    }
    stop_with_driver()
    asked = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(asked))
    signals = {number.name: str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    told = {
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "signals": signals,
        "dies_with_parent_by": asked.value,
        "main_thread": threading.current_thread() is threading.main_thread(),
        "random": random.random(),
        "argv": sys.argv,
    }
    print(json.dumps(before | told))
    return 0


def talk() -> int:
    """Speak in every way there is."""
    print("Python")
    sys.stdout.flush()
    os.write(1, b"a C library\n")
    os.system("echo a subprocess; echo its stderr >&2")
    print("stderr", file=sys.stderr)
    atexit.register(print, "an exit handler")
    return 0


def train() -> int:
    """A step with as many threads as there are, autograd's included."""
    import torch

    weights = torch.ones(500, 500, requires_grad=True)
    (weights @ weights).sum().backward()
    print(torch.get_num_threads(), float(weights.grad.sum()))
    return 0


def end(how: str) -> int:
    """End with an exit code, or by the signal of that name."""
    if how.isdecimal():
        return int(how)
    os.kill(os.getpid(), getattr(signal, how))
    signal.pause()
    return 0


def hold(run_dir: str) -> int:
    """Hold the lock that was handed down until a line is written to `go` in the directory."""
    with rundir.inherited_lock():
        Path(run_dir, "held").touch()
        signal.pause()
    return 0
