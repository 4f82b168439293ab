"""Hashes of files' content, remembered, so that a large file that has not changed is not read again."""

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

from llmkit.storage import cache_dir

# A file that was written to so shortly ago may be written to again without its times changing: clocks of file systems
# tick as seldom as every two seconds. Git calls such files racy (gitformat-index, racy-git).
SETTLED = 2.0  # seconds


def content_hash(file: Path) -> str:
    """The BLAKE2b hash of the file's content, 16 bytes in hexadecimal. Raises OSError if it cannot be read.

    It is looked up in the cache only for a file whose size, inode and times of change are those it had when it was
    read. The time at which the kernel saw the last change (ctime) is among them, which nobody can set.
    """
    state = file_state(file)
    memo = cache_dir() / "hashes" / f"{hashlib.blake2b(os.fsencode(file.absolute()), digest_size=16).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or broken: read the file
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["hash"])
    began = time.time()
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    changed = max(file.stat().st_mtime, file.stat().st_ctime)
    if file_state(file) == state and changed < began - SETTLED:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            _write(memo, json.dumps({"path": str(file.absolute()), "state": state, "hash": digest}))
    return digest


def file_state(file: Path) -> list[int]:
    """What changes when the file's content does: size, times of change in ns, inode, device. Raises OSError."""
    facts = file.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev]


def _write(memo: Path, text: str) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    partial = memo.with_name(f".{memo.name}.{uuid.uuid4().hex}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, memo)
