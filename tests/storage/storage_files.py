"""What the tests of storage ask of directories."""

import os
from pathlib import Path

MIB = 2**20


def everything_in(directory: Path) -> dict[str, bytes]:
    """All files below a directory, hidden ones included."""
    found = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}
