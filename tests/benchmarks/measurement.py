"""What the benchmarks share: the machine they ran on, medians with their spread, and results as JSON."""

import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass
class Timing:
    """Seconds of one thing, measured once a round."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> list[str]:
        """Its name, median, fastest and slowest, as cells of a table."""
        return [self.name, *(f"{value:.2f} s" for value in (self.median, min(self.seconds), max(self.seconds)))]


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, Python, the libraries, and how busy the machine was."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "datasets")},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def write_results(path: Path, timings: list[Timing], **more: Any) -> None:
    """Everything measured, with the machine, for later comparison."""
    measured = {timing.name: {"median": timing.median, "seconds": timing.seconds} for timing in timings}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**more, "timings": measured}, indent=2) + "\n", encoding="utf-8")
