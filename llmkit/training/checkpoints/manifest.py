"""Checkpoints of a run: `checkpoints/step-00000100/`, which count only once their MANIFEST.json is there."""

import json
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmkit import rundir

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial"  # where Transformers writes, before a checkpoint is whole


def commit(written: Path, run_dir: Path, *, step: int, facts: dict[str, Any]) -> Path:
    """Make the files in `written` a checkpoint of `run_dir`: manifest first, then its name, in one rename.

    Args:
        facts: what the run must know of itself to go on: the data's fingerprint, the seconds so far.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    listing = {str(path.relative_to(written)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    rundir.write_json(written / MANIFEST, {"step": step, **facts, "files": listing})
    target = run_dir / rundir.CHECKPOINTS / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(written, target)
    return target


def latest(run_dir: Path) -> Path | None:
    """The newest committed checkpoint of a run, or None."""
    folder = run_dir / rundir.CHECKPOINTS
    if not folder.is_dir():
        return None
    committed = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{8}", p.name) and (p / MANIFEST).is_file()]
    return max(committed, default=None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a committed checkpoint says of itself: `step`, `dataset_fingerprint`, `seconds`, `files`."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
