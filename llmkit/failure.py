"""Why a run has failed: said once, by whichever of its processes was the first to fail."""

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from llmkit import durable, rundir
from llmkit.config import TrainConfig
from llmkit.errors import EXIT_FAILED, ConfigError, LlmkitError, Stopped
from llmkit.training.advice import is_out_of_memory, reason, untried_changes
from llmkit.training.versions import versions


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error that has ended one process of a run."""

    problems: list[str]
    status: str  # of result.json
    exit_code: int
    trace: str | None = None  # of our bugs; what is written for the user has none
    rank: int = 0
    time: float = field(default_factory=time.time)  # seconds since the epoch

    @classmethod
    def of(cls, error: Exception, config: TrainConfig, *, rank: int = 0) -> Self:
        """What `error` means to the user, with advice where memory has run out."""
        if isinstance(error, LlmkitError):
            return cls(
                problems=error.problems if isinstance(error, ConfigError) else [str(error)],
                status="stopped" if isinstance(error, Stopped) else "failed",
                exit_code=error.exit_code,
                rank=rank,
            )
        return cls(
            problems=[explained(error, config)],
            status="failed",
            exit_code=EXIT_FAILED,
            trace="".join(traceback.format_exception(error)),
            rank=rank,
        )

    @property
    def message(self) -> str:
        """All problems, a line each."""
        return "\n".join(self.problems)

    def tell(self) -> None:
        """Show it on stderr; several problems as a list."""
        if self.trace:
            print(self.trace, file=sys.stderr)
        where = f"rank {self.rank}: " if self.rank else ""
        if len(self.problems) == 1:
            print(f"error: {where}{self.problems[0]}", file=sys.stderr, flush=True)
        else:
            print(f"{where}{len(self.problems)} errors:", *(f"  - {problem}" for problem in self.problems), sep="\n",
                  file=sys.stderr, flush=True)  # fmt: skip

    def record(self, config: TrainConfig, run_dir: Path) -> None:
        """Write it to result.json."""
        rundir.write_result(
            run_dir,
            status=self.status,
            error=self.message,
            objective_name=config.objective,
            method=config.method.name,
            versions=versions(),
        )

    def leave(self, run_dir: Path) -> None:
        """Leave it for the process that started this rank."""
        durable.write_text(_file(run_dir, self.rank), json.dumps(dataclasses.asdict(self)) + "\n")


def explained(error: Exception, config: TrainConfig) -> str:
    """An error's message; where memory has run out, with what may help."""
    if is_out_of_memory(error):
        changes = "".join(f"\n  {change}" for change in untried_changes(config))
        return f"out of memory: {reason(error)}.\nWhat may help, the cheapest first:{changes}"
    return str(error) or type(error).__name__


def forget(run_dir: Path, rank: int) -> None:
    """Remove what a rank of that number has left in an earlier session of the run."""
    _file(run_dir, rank).unlink(missing_ok=True)


def first_left(run_dir: Path, ranks: Iterable[int]) -> Failure | None:
    """The earliest failure that one of the ranks has left: the others failed because it was gone."""
    left = [rundir.read_json(_file(run_dir, rank)) for rank in ranks]
    return min((Failure(**found) for found in left if found), default=None, key=lambda failure: failure.time)


def _file(run_dir: Path, rank: int) -> Path:
    return run_dir / rundir.RANKS / f"rank-{rank}.failure.json"
