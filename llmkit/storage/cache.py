"""The user's cache directory, and directories in it that are made once and then only read.

Everything below `cache_dir()` can be deleted at any time: it is made again when it is next needed.
"""

import os
import shutil
import uuid
from collections.abc import Callable
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
    sees `target` sees all of it, and a builder that fails or is killed leaves no `target` behind. Any number of
    processes may build at the same time: the first to finish wins, and the others return what it made.
    """
    if target.is_dir():
        return target
    # Not tempfile.mkdtemp: its mode 0700 would survive the rename and lock other users out of a shared cache.
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
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
