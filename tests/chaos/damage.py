"""What disks, bad copies and people do to a checkpoint that was committed whole."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from llmkit.training.checkpoints.manifest import MANIFEST


def flip_a_bit(checkpoint: Path, draw: random.Random) -> None:
    """In any file, the manifest too."""
    _flip(draw.choice(sorted(checkpoint.iterdir())), draw)


def flip_a_bit_of_the_manifest(checkpoint: Path, draw: random.Random) -> None:
    """It is small, and a part of it may stay readable and say something else."""
    _flip(checkpoint / MANIFEST, draw)


def truncate_a_file(checkpoint: Path, draw: random.Random) -> None:
    """To any length below its own."""
    file = _any_file(checkpoint, draw)
    os.truncate(file, draw.randrange(file.stat().st_size))


def delete_a_file(checkpoint: Path, draw: random.Random) -> None:
    """Any but the manifest."""
    _any_file(checkpoint, draw).unlink()


def garble_the_manifest(checkpoint: Path, draw: random.Random) -> None:
    """Bytes that are no JSON, as long as before."""
    manifest = checkpoint / MANIFEST
    manifest.write_bytes(draw.randbytes(manifest.stat().st_size))


def delete_the_manifest(checkpoint: Path, draw: random.Random) -> None:
    """What a copy that was not finished lacks."""
    (checkpoint / MANIFEST).unlink()


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flip_a_bit,
    truncate_a_file,
    delete_a_file,
    garble_the_manifest,
    flip_a_bit_of_the_manifest,
    delete_the_manifest,
]


def _any_file(checkpoint: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST))


def _flip(file: Path, draw: random.Random) -> None:
    # Copied first: a file may be linked to by the checkpoint before, and a disk that fails hits one of its copies.
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.unlink()
    file.write_bytes(content)
