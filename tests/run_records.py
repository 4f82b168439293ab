"""What runs that a scheduler has started left in their directories, for the tests of every launcher."""

import json
from pathlib import Path

from slurm_cluster import wait_until


def sweep_of(directory: Path) -> list[dict]:
    """The jobs that a sweep's record lists."""
    return json.loads((directory / "sweep.json").read_text())["jobs"]


def steps_of(run_dir: Path) -> list[int]:
    """The steps that a run has logged a loss of, in their order."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line and line.endswith("}")]


def wait_for_steps(run_dir: Path, count: int) -> None:
    """Wait until a run has logged so many steps."""

    def told() -> str:
        log = run_dir / "console.log"
        return f"no training step was seen\n{log.read_text() if log.exists() else 'no log'}"

    wait_until(lambda: len(steps_of(run_dir)) >= count, told, 180)
