"""How much memory this machine, or the container this runs in, has left. Imports nothing heavy."""

import os
from contextlib import suppress
from pathlib import Path


def available_host_memory() -> int:
    """Bytes of host memory that this process can still have: of the machine, or of its container (cgroup v2)."""
    there = [sizes_in("/proc/meminfo").get("MemAvailable", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))]
    with suppress(OSError, ValueError):  # no such file outside a container, "max" in one without a limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{what}").read_text()) for what in ("max", "current"))
        there.append(limit - used)
    return max(min(there), 0)


def sizes_in(path: str) -> dict[str, int]:
    """The sizes in a file of /proc; empty on systems without it."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1] == "kB"}
