"""Processes that carry a run on until they end or are killed: forks of this one, which has imported all that is slow.

A fork runs `llmkit.worker.main` on a run directory that was prepared by the launcher, with the environment that the
launcher gives: what differs from a fresh worker is only that its imports cost nothing.
"""

import atexit
import copy
import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from llmkit import worker
from llmkit.config import TrainConfig
from llmkit.launchers.local import start_worker
from llmkit.launchers.prepare import prepare
from llmkit.training.checkpoints import manifest

POLL_SECONDS = 0.002
HANGS_AFTER = 300.0  # seconds; an undisturbed life takes one or two
LOG = "log.txt"  # beside the run directory
# What a run imports only once it needs it.
IMPORTED_LATE = (
    "bitsandbytes",
    "matplotlib.pyplot",
    "transformers.models.mistral.modeling_mistral",
    "peft.tuners.lora",
)


def warm_up(config: TrainConfig) -> None:
    """Import, once for all forks, what a worker imports for runs like `config` and for those that need less."""
    worker.hide_unused_libraries(config)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("llmkit.recipes.sft", "llmkit.recipes.dpo", *IMPORTED_LATE):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to every page, and so copy it
    atexit.register(gc.unfreeze)  # else libraries in C++ report their objects as leaks at exit


class Life:
    """One process at work on a run directory."""

    def __init__(self, config: TrainConfig, run_dir: Path, *, within: Callable[[], None] = lambda: None):
        """Start it; `within` is called in the new process before the run."""
        with prepare(copy.deepcopy(config), run_dir) as lock:
            self.began = time.monotonic()
            self.exit_code: int | None = None
            self.hung = False
            self.pid = os.fork()
            if self.pid == 0:
                _live(run_dir, lock.fileno(), within)

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def ended(self) -> bool:
        """Whether it has ended by itself; `exit_code` then says how."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Return once it has ended, or when `until()` holds: then True. Kills it if it hangs."""
        while not self.ended():
            if until():
                return True
            if self.seconds() > HANGS_AFTER:
                self.hung = True
                self.kill()
                return False
            time.sleep(POLL_SECONDS)
        return False

    def kill(self) -> None:
        """SIGKILL, at once."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.exit_code = os.waitstatus_to_exitcode(status)


def run_in_fresh_process(config: TrainConfig, run_dir: Path) -> int:
    """The ordinary worker, as `llmkit train` starts it, from start to end; returns its exit code."""
    with prepare(copy.deepcopy(config), run_dir) as lock, (run_dir.parent / LOG).open("w") as log:
        return start_worker(config, run_dir, lock=lock, output=log).wait()


def copy_run(run_dir: Path, target: Path) -> Path:
    """The run as it stands, links between its files kept, so that another trial may begin with it."""
    target.parent.mkdir(parents=True)
    shutil.copytree(run_dir, target, copy_function=_copy_once({}))
    return target


def newest_step(run_dir: Path) -> int:
    """The step of the newest committed checkpoint; 0 if there is none."""
    newest = manifest.latest(run_dir)
    return manifest.step_of(newest) if newest else 0


def _copy_once(copied: dict[int, str]) -> Callable[[str, str], None]:
    """A copy function for `copytree`: the second name of a file is linked to the copy of the first."""

    def copy_or_link(source: str, target: str) -> None:
        inode = os.stat(source).st_ino
        if inode in copied:
            os.link(copied[inode], target)
        else:
            copied[inode] = target
            shutil.copyfile(source, target)

    return copy_or_link


def _live(run_dir: Path, lock: int, within: Callable[[], None]) -> None:
    """The whole life of the new process; never returns."""
    exit_code = 1
    try:
        log = os.open(run_dir.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        os.environ |= {"LLMKIT_LOCK_FD": str(lock), "LLMKIT_DRIVER": str(os.getppid())}
        within()
        exit_code = worker.main([str(run_dir)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # the parent's business at exit is not this process's
