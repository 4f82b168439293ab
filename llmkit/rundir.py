"""The run directory: where a run lives and which files it holds (the contract with users and tools)."""

import datetime
import fcntl
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import IO, Any

from llmkit import durable
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, ConfigError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
RESULT = "result.json"
FINAL = "final"
MERGED = "merged"
CHECKPOINTS = "checkpoints"
LOSS_PLOT = "loss.png"
SAMPLES = "samples.jsonl"
CONSOLE = "console.log"  # what is said where no terminal shows it
PACK_LOG = "pack.log"  # of a sweep: what its packs say of themselves (launcher=packed)
RANKS = "ranks"  # the logs of all processes but the first
DATA_AUDIT = "data_audit.json"
PROBE = "probe.json"  # what a server of the model must reproduce
RUNGS = "rungs.json"  # of a run with early_stop: step -> its figures there, and whether it went on; null while open
BEST_WEIGHTS = ".best.safetensors"  # while the run goes on with training.final=best
NON_FINITE_BATCH = "nonfinite_batch.json"
SWEEP = "sweep.json"
REPORT = "report.html"  # of a run or a sweep: see reporting/
JOB = "job.json"  # who runs it: see launchers/job_record.py
FILES = "files.json"  # of a copy elsewhere: what it holds, written last
LOCK = ".lock"
CANCEL = ".cancel"  # that one run of a pack is to stop, and the others are not
ASIDE = ".before-"  # after a run's name, and before a number: where resume=never has moved it

# The keys of result.json, present in every one: null where a run did not come that far.
RESULT_KEYS = (
    "status",  # completed, failed, preempted (resumable) or stopped (before a step was saved, or by early_stop)
    "error",
    "steps",
    "train_loss",
    "eval_loss",
    "eval_loss_interval",  # 95%: [low, high], for these rows were drawn and not others; null where it is not known
    "exact_match",
    "train_exact_match",
    "preference_accuracy",
    "train_preference_accuracy",
    "test",  # figures on data.test, each with its 95% interval
    "objective",
    "objective_name",
    "early_stop",  # where the run stood at the rung at which early_stop ended it; null for any other end
    "base",  # the figures of the model before training
    "tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "seconds",
    "device",
    "engine",  # what holds the processes together: single, ddp, zero1 to zero3, fsdp2
    "device_seconds",
    "cost",
    "base_model",
    "final_is",
    "final_step",  # whose weights final/ holds
    "method",
    "model_dir",
    "dataset_fingerprint",
    "versions",
)


def default_run_dir(name: str | None = None) -> str:
    """`runs/<name>`, or `runs/<date>_<time>` for a run without a name."""
    return f"runs/{name or datetime.datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON in one step: a reader sees the old file or the new one, never half of it."""
    durable.write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file. Raises ConfigError if it is something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error}); remove it to start afresh.") from error


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The run's `result.json`, or None while there is none."""
    return read_json(run_dir / RESULT)


def is_aside(run_dir: Path) -> bool:
    """Whether it is a run that resume=never has moved out of the way."""
    return re.search(rf"{re.escape(ASIDE)}\d+$", run_dir.name) is not None


def is_over(result: dict[str, Any] | None) -> bool:
    """Whether nothing is left to do for a run of that result: it is completed, or early_stop has ended it."""
    return result is not None and (result["status"] == "completed" or result.get("early_stop") is not None)


def exit_code(result: dict[str, Any] | None) -> int:
    """The exit code of the contract for a run that has left that result, or none."""
    if is_over(result):
        return EXIT_DONE
    return EXIT_PREEMPTED if result is not None and result["status"] in ("preempted", "stopped") else EXIT_FAILED


def write_result(run_dir: Path, **known: Any) -> None:
    """Write `result.json` with every key of the contract, null where it is not known."""
    assert set(known) <= set(RESULT_KEYS), set(known) - set(RESULT_KEYS)
    write_json(run_dir / RESULT, dict.fromkeys(RESULT_KEYS) | known)


def show_log(path: Path, *, offset: int = 0) -> int:
    """Print what is new in a log from a byte on; returns where it ends."""
    try:
        with path.open("rb") as log:
            log.seek(offset)
            text = log.read()
    except FileNotFoundError:
        return offset
    sys.stdout.write(text.decode("utf-8", errors="replace"))
    sys.stdout.flush()
    return offset + len(text)


def discard_unused(run_dir: Path) -> None:
    """Remove a run directory in which nothing was trained: wrong input should leave nothing behind."""
    if {path.name for path in run_dir.iterdir()} <= {CONFIG, RESULT, LOCK, RANKS, JOB}:
        shutil.rmtree(run_dir, ignore_errors=True)


def is_locked(run_dir: Path) -> bool:
    """Whether somebody writes to the run directory now."""
    try:
        with open(run_dir / LOCK, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def lock_holder(run_dir: Path) -> int | None:
    """The process of this machine that writes to the run directory; None if there is none, or it is elsewhere."""
    words = (run_dir / LOCK).read_text(encoding="utf-8").split() if is_locked(run_dir) else []
    here = len(words) == 4 and words[3] == host() and words[1].isdecimal()  # as `lock` writes it
    return int(words[1]) if here else None


def host() -> str:
    """The name of this machine, as locks and job records say it."""
    return os.uname().nodename


def lock(run_dir: Path) -> IO[str]:
    """Become the one writer of `run_dir`; the lock ends when the returned file (and its copies in children) close.

    Raises ConfigError, naming the process, if another one holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - the open file is the lock
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be written ({error.strerror}); choose another run_dir=.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"{run_dir} is in use by {holder}; wait for it, stop it, or choose another name=.") from None
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {host()}")
    file.flush()
    return file


def inherited_locks() -> list[IO[str]]:
    """The locks that the process which started this one has handed down (LLMKIT_LOCK_FD), if it has."""
    descriptors = os.environ.pop("LLMKIT_LOCK_FD", "").split()
    return [os.fdopen(int(descriptor), "a", encoding="utf-8") for descriptor in descriptors]


def inherited_lock() -> IO[str] | None:
    """The one lock that has been handed down, if one has."""
    return next(iter(inherited_locks()), None)
