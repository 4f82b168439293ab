"""Writing files so that they survive a crash: whole or not at all, and on the disk when the call returns.

A rename is atomic for whoever reads, but only an fsync puts the bytes, and the name that leads to them, on the disk.
"""

import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path

PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}")  # what a file is called until it is whole


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step: a reader, also after a crash, sees the old content or the new, never a part.

    The directory must exist. Raises OSError, and then leaves `path` as it was.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_partials(directory: Path) -> None:
    """Remove what `write_bytes` had begun in `directory` when its process was killed. Nobody else may write there."""
    for path in directory.glob(".*"):
        if PARTIAL.fullmatch(path.name):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Put one file's content, or a directory's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Put everything below `directory` on the disk: every file, then every directory, itself last."""
    folders = []
    for folder, _, names in os.walk(directory):
        folders.append(Path(folder))
        for name in names:
            sync(Path(folder, name))
    for path in reversed(folders):
        sync(path)


def second_name(source: Path, target: Path) -> None:
    """Give a file that nobody writes to any more a second name, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target)
        sync(target)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
