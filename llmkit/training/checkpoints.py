"""Checkpoints of a run: `checkpoints/step-00000100/`, which count only once their MANIFEST.json is there."""

import json
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path

from llmkit import rundir

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial"  # where Transformers writes, before a checkpoint is whole


def commit(written: Path, run_dir: Path, *, step: int) -> Path:
    """Make the files in `written` a checkpoint of `run_dir`: manifest first, then its name, in one rename."""
    files = sorted(path for path in written.rglob("*") if path.is_file())
    listing = {str(path.relative_to(written)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    rundir.write_json(written / MANIFEST, {"step": step, "files": listing})
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


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was taken at."""
    return int(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["step"])


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
