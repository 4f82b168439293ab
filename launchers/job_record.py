"""`job.json` in a run directory: which job of which launcher runs it, and how far that job is.

The driver writes it when a run is handed over, the job when it starts and ends. A job that was killed cannot: what its
scheduler says of it then counts.
"""

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llmkit import rundir

QUEUED, RUNNING, ENDED = "queued", "running", "ended"
INTERRUPTED = "interrupted"  # it has ended; whether it is queued again its scheduler alone knows
CANCELLED = "cancelled before it started"
GIVEN_UP = "cancelled: its scheduler is gone"


@dataclass(kw_only=True, slots=True)
class JobRecord:
    """One job. A job that is queued again after a preemption stays the same one."""

    launcher: str
    job_id: str
    state: str = QUEUED
    submitted: str = ""  # date and time, UTC
    host: str | None = None  # where it runs, or ran last
    process: int | None = None  # the process on that host
    starts: int = 0
    fruitless: int = 0  # starts in a row that ended before another checkpoint was made
    device: str | None = None  # the GPUs it works on, how busy and how full, where NVML says
    exit_code: int | None = None
    ended: str = ""  # how, where the job itself could not say
    log: str | None = None  # what the scheduler keeps of the job's own words, beside console.log

    def write(self, run_dir: Path) -> None:
        """Write the record in one step."""
        rundir.write_json(run_dir / rundir.JOB, dataclasses.asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """The record of a run; None if it was not handed to anybody."""
        values = rundir.read_json(run_dir / rundir.JOB)
        return cls(**values) if values is not None else None


def record_end(run_dir: Path, code: int) -> None:
    """Write down that the process which runs it is done with it."""
    if record := JobRecord.read(run_dir):
        record.state, record.exit_code = ENDED, code
        record.write(run_dir)


def now() -> str:
    """The time of a record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
