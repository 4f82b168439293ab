"""The user's cache directory, and directories in it that are made once and then only read.

Everything below `cache_dir()` can be deleted at any time: it is made again when it is next needed.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The absolute path of llmkit's cache: `$LLMKIT_CACHE`, else `$XDG_CACHE_HOME/llmkit`, else `~/.cache/llmkit`.

    The directory need not exist yet. A variable set to the empty string counts as unset.
    """
    if own := os.environ.get("LLMKIT_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification says that a relative path is invalid and must be ignored.
    base = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return base / "llmkit"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return the directory `target`, calling `build(directory)` to fill it if it does not exist yet.

    `build` writes into a new directory beside `target`, which is renamed into place when it is complete. So whoever
    sees `target` sees all of it, and a builder that fails or is killed leaves no `target` behind. Of several processes
    that want it at the same time one builds, and the others wait for it (on file systems without locks each builds its
    own, and the first to finish wins).
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(target) as alone:
        if target.is_dir():
            return target
        if alone:
            _remove_leftovers(target)
        # Not tempfile.mkdtemp: its mode 0700 would survive the rename and lock other users out of a shared cache.
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        scratch.mkdir()
        try:
            build(scratch)
            scratch.rename(target)
        except OSError:
            # Renaming onto a directory that is not empty fails: another process finished first. Anything else is real.
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _only_builder(target: Path) -> Iterator[bool]:
    """Hold the target's lock, which the kernel frees when its holder dies; False where files cannot be locked."""
    locks = target.parent / ".locks"
    locks.mkdir(exist_ok=True)
    with open(locks / target.name, "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _remove_leftovers(target: Path) -> None:
    """What builders that were killed had begun: whoever holds the lock knows that none of them is at work."""
    for scratch in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(scratch, ignore_errors=True)
