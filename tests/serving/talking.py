"""A finished run that has learnt to answer, made once per process: `tuned_run`, made in a moment, says nothing."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
_kept = tempfile.TemporaryDirectory(prefix="llmkit-talking-")


@pytest.fixture(scope="module")
def talking_run(closed_world: None) -> Path:
    """The directory `.../runs/talking` of 80 steps of lora (r=8, float32) of model=tiny on data=demo. Read only."""
    return _trained()


@functools.cache
def _trained() -> Path:
    subprocess.run(
        [sys.executable, "-m", "llmkit", "train", "name=talking", "training.max_steps=80", "evaluation=off"],
        cwd=_kept.name,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        check=True,
        capture_output=True,
        timeout=600,
    )
    return Path(_kept.name).resolve() / "runs" / "talking"
