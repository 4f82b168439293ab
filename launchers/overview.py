"""What is going on: the runs below some directories, whoever started them, from their files and their schedulers."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config import TrainConfig, load
from llmkit.errors import ConfigError, LlmkitError, did_you_mean
from llmkit.launchers.cluster import SCHEDULERS, Seen, connect, judged
from llmkit.launchers.devices import devices_of
from llmkit.launchers.job_record import ENDED, QUEUED, RUNNING, JobRecord
from llmkit.training.metrics import read_metrics

OPEN = (QUEUED, RUNNING)
RUNS = Path("runs")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run at one moment. `state` is queued, running, one of result.json's, or unknown (it left no result)."""

    run_dir: Path
    launcher: str
    job_id: str
    state: str
    detail: str = ""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    device: str = ""


def directory_named(name: str, *, words: Iterable[str] = ()) -> Path:
    """A directory as it is named, or below runs/. Raises ConfigError with the nearest name.

    Args:
        words: what else may have been meant.
    """
    path = Path(name).expanduser()
    for candidate in (path, RUNS / name):
        if candidate.is_dir():
            return candidate
    places = {folder for folder in (RUNS, path.parent) if folder.is_dir()}
    known = sorted(one.name for folder in places for one in folder.iterdir() if one.is_dir())
    near = did_you_mean(path.name, [*known, *words])
    raise ConfigError(f"{name}: there is no such run, sweep or directory (seen from {Path.cwd()}).{near}")


def runs_below(directories: Iterable[Path]) -> list[Path]:
    """The run directories that these are or hold, those of sweeps too. Raises ConfigError for what is not there."""
    found: list[Path] = []
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: there is no such directory (seen from {Path.cwd()}).")
        for path in [directory, *sorted(directory.iterdir())]:
            if (path / rundir.CONFIG).exists():
                found.append(path)
                if path is directory:  # what lies below a run is its own
                    break
            elif path is not directory and (path / rundir.SWEEP).exists():
                found += sorted(config.parent for config in path.glob(f"*/{rundir.CONFIG}"))
    return list(dict.fromkeys(found))


class Overview:
    """Looks at runs, and asks each scheduler once at each look for all of its jobs."""

    def __init__(self) -> None:
        self._silent: set[str] = set()  # by the launcher's settings, schedulers of which it has been said

    def look(self, run_dirs: Sequence[Path]) -> list[RunView]:
        """How these runs stand, in the same order."""
        configs = {run_dir: load(run_dir) for run_dir in run_dirs}
        records = {run_dir: JobRecord.read(run_dir) for run_dir in run_dirs}
        told = self._ask([(configs[path], record) for path, record in records.items() if record is not None])
        return [
            _view(path, config, records[path], told.get(repr(config.launcher), {})) for path, config in configs.items()
        ]

    def is_silent(self, config: TrainConfig) -> bool:
        """Whether the scheduler of a run did not answer at the last look."""
        return repr(config.launcher) in self._silent

    def _ask(self, jobs: Sequence[tuple[TrainConfig, JobRecord]]) -> dict[str, dict[str, Seen] | None]:
        """What each scheduler says of its jobs that have not ended, by the launcher's settings; None: no answer."""
        open_jobs: dict[str, list[str]] = {}
        launchers: dict[str, Any] = {}
        for config, record in jobs:
            if record.launcher in SCHEDULERS and config.launcher.name == record.launcher and record.state != ENDED:
                key = repr(config.launcher)
                open_jobs.setdefault(key, []).append(record.job_id)
                launchers[key] = config.launcher
        return {key: self._ask_one(launchers[key], job_ids) for key, job_ids in open_jobs.items()}

    def _ask_one(self, launcher: Any, job_ids: Sequence[str]) -> dict[str, Seen] | None:
        key = repr(launcher)
        try:
            told = connect(launcher).seen(job_ids)
        except LlmkitError as error:
            if key not in self._silent:
                print(f"warning: {error} What follows is what the run directories say.", file=sys.stderr)
            self._silent.add(key)
            return None
        self._silent.discard(key)
        return told


def _view(run_dir: Path, config: TrainConfig, record: JobRecord | None, told: dict[str, Seen] | None) -> RunView:
    result = rundir.read_result(run_dir)
    seen = _seen(run_dir, record, told, ended=result is not None)
    state, detail = seen.state, seen.detail
    progress = _progress(run_dir, config, running=state == RUNNING)
    if state not in OPEN:
        state = result["status"] if result is not None else _end(seen.detail)
        detail = (result or {}).get("error") or ("" if result is not None else detail)
    device = (result or {}).get("device") or ""
    if state == RUNNING and record is not None:
        device = " ".join(filter(None, [record.host, _devices(record)]))
        detail = ""  # where it is, once more
    return RunView(
        run_dir=run_dir,
        launcher=record.launcher if record is not None else config.launcher.name,
        job_id=record.job_id if record is not None else "",
        state=state,
        detail=detail.splitlines()[0] if detail else "",
        device=device,
        **progress,
    )


def _devices(record: JobRecord) -> str | None:
    """The GPUs of a run that is running: asked for now on this machine, else as its job has last seen them."""
    here = record.process if record.host == rundir.host() else None
    return (devices_of(here) if here is not None else None) or record.device


def _end(detail: str) -> str:
    """The state of a run that left no result."""
    return "stopped" if detail.lower().startswith("cancelled") else "unknown"


def _seen(run_dir: Path, record: JobRecord | None, told: dict[str, Seen] | None, *, ended: bool) -> Seen:
    """Where a run's job is; of a run on this machine its lock tells, and of a silent scheduler's whether it `ended`."""
    if record is None or record.launcher not in SCHEDULERS:
        # A pack holds the locks of all its runs until the last one's end.
        is_over = record is not None and record.state == ENDED
        return Seen(state=RUNNING if rundir.is_locked(run_dir) and not is_over else ENDED)
    if told is None:
        return Seen(state=ENDED if ended and record.state == RUNNING else record.state)
    if record.job_id not in told:  # it may have ended while the scheduler was asked, and says why
        record = JobRecord.read(run_dir) or record
    return judged(record, told.get(record.job_id))


def _progress(run_dir: Path, config: TrainConfig, *, running: bool) -> dict[str, Any]:
    """How far a run is, from metrics.jsonl."""
    records = read_metrics(run_dir)
    logged = [record for record in records if "loss" in record]
    if not records:
        return {"steps": config.training.max_steps}
    step = records[-1]["step"]
    steps = config.training.max_steps
    if steps is None and records[-1].get("epoch"):
        steps = max(round(step / records[-1]["epoch"] * config.training.num_train_epochs), step)
    found: dict[str, Any] = {"step": step, "steps": steps}
    if logged:
        found |= {"loss": logged[-1]["loss"], "tokens_per_second": logged[-1].get("tokens_per_second")}
        speed, tokens = logged[-1].get("tokens_per_second"), logged[-1].get("tokens")
        if running and steps and speed and tokens:
            found["seconds_left"] = (steps - step) * tokens / logged[-1]["step"] / speed
    return found
