"""Which checkpoints of a run there are: `checkpoints/step-00000100/`, each with a MANIFEST.json that vouches for it.

A checkpoint is written beside, made durable, given its manifest and then its name, in this order. So what has no valid
manifest does not exist, at whatever instant a process or a machine dies. Imports nothing heavy: the driver asks too.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llmkit import durable, rundir
from llmkit.errors import LlmkitError

MANIFEST = "MANIFEST.json"
SEAL = "sha256"  # in a manifest: of the rest of it
PARTIAL = ".partial"  # where Transformers writes; behind a dash and a name, where a checkpoint is before it is whole
DISCARDED = ".discarded"  # what a checkpoint is called while it is being removed
STEP = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(LlmkitError):
    """A checkpoint whose files are not those that its manifest lists."""


def name_of(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def commit(written: Path, run_dir: Path, *, step: int, facts: dict[str, Any]) -> Path:
    """Make the files in `written` the checkpoint of `step`: durable first, then the manifest, then the name.

    A whole checkpoint of that step that is there already stays, and `written` is removed.

    Args:
        facts: what the manifest says beside `step` and `files` (size in bytes and sha256 of each).
    """
    target = run_dir / rundir.CHECKPOINTS / name_of(step)
    if is_committed(target):
        _remove(written)
        return target
    files = sorted(path for path in written.rglob("*") if path.is_file())
    listing = {
        path.relative_to(written).as_posix(): {"size": path.stat().st_size, "sha256": durable.sha256_of(path)}
        for path in files
    }
    return adopt(written, run_dir, {"step": step, **facts, "files": listing})


def adopt(written: Path, run_dir: Path, saved: dict[str, Any]) -> Path:
    """Make the files in `written`, which are those that the manifest `saved` lists, a checkpoint of the run."""
    target = run_dir / rundir.CHECKPOINTS / name_of(saved["step"])
    durable.sync_tree(written)
    durable.write_text(written / MANIFEST, json.dumps(sealed(saved), indent=2) + "\n")
    if target.exists():
        _remove(target)
    os.replace(written, target)
    durable.sync(target.parent)
    return target


def committed(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    folder = run_dir / rundir.CHECKPOINTS
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP.fullmatch(path.name) and is_committed(path)]
    return sorted(found, key=step_of)


def named(run_dir: Path) -> list[Path]:
    """All that have a checkpoint's name, newest first. One that is not committed was once, and has been damaged."""
    found = [path for path in (run_dir / rundir.CHECKPOINTS).glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def latest(run_dir: Path) -> Path | None:
    """The newest committed checkpoint of a run, or None."""
    return max(committed(run_dir), default=None, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint's name tells."""
    return int(checkpoint.name.rpartition("-")[2])


def is_committed(checkpoint: Path) -> bool:
    """Whether a manifest is there and every file it lists has its size; `verify` looks at the bytes too."""
    try:
        files = read_manifest(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == about["size"] for name, about in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a committed checkpoint says of itself: `step`, `files`, and the facts it was committed with.

    Raises OSError or ValueError if the manifest is not there or not as it was written.
    """
    return parse((checkpoint / MANIFEST).read_bytes())


def parse(content: bytes) -> dict[str, Any]:
    """The manifest that a file holds. Raises ValueError if it is not as it was written."""
    saved = json.loads(content)
    if not isinstance(saved, dict) or saved != sealed(saved):
        raise ValueError("its own sha256 differs")
    return saved


def sealed(saved: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the sha256 of all that it says."""
    said = {key: value for key, value in saved.items() if key != SEAL}
    return {**said, SEAL: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def verify(checkpoint: Path) -> None:
    """Read every byte. Raises DamagedCheckpoint if one is not as it was written."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint / MANIFEST} is not what was saved ({error})") from error
    for name, about in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is gone")
        if durable.sha256_of(file) != about["sha256"]:
            raise DamagedCheckpoint(f"{file} is not what was saved (its sha256 differs)")


def best(checkpoints: Collection[Path]) -> Path | None:
    """The checkpoint whose evaluation had the lowest loss; None if none was evaluated at its step."""
    losses = {path: read_manifest(path).get("eval_loss") for path in checkpoints}
    evaluated = {path: loss for path, loss in losses.items() if loss is not None}
    return min(evaluated, default=None, key=lambda path: (evaluated[path], step_of(path)))


def rotate(run_dir: Path, *, keep: int, needed: Collection[Path] = ()) -> None:
    """Remove all but the `keep` newest checkpoints, the best, and those in `needed`; and what was left half-made.

    The newest always stays. Called after a commit, never before.
    """
    there = committed(run_dir)
    staying = {*there[-max(keep, 1) :], *needed}
    if chosen := best(there):
        staying.add(chosen)
    for path in there:
        if path not in staying:
            _remove(path)


def remove_leftovers(run_dir: Path) -> None:
    """What a killed process had begun: written but not committed, or removed but not gone. Needs the run's lock."""
    folder = run_dir / rundir.CHECKPOINTS
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((f"{PARTIAL}-", f"{DISCARDED}-")):
            shutil.rmtree(path, ignore_errors=True)
    durable.remove_partials(run_dir)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it does not count any more, and nothing of it is lost."""
    number, aside = 1, checkpoint.with_name(f"damaged-{checkpoint.name}")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    os.replace(checkpoint, aside)
    return aside


def _remove(directory: Path) -> None:
    """Under another name first: a half-removed directory must not look like a checkpoint."""
    discarded = directory.with_name(f"{DISCARDED}-{directory.name}")
    shutil.rmtree(discarded, ignore_errors=True)
    os.replace(directory, discarded)
    shutil.rmtree(discarded, ignore_errors=True)
