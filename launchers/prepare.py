"""Make a run directory ready for its worker, or say why nothing is to be done."""

from pathlib import Path
from typing import IO

from llmkit import rundir
from llmkit.config import TrainConfig, adopt_findings, differences, load, save
from llmkit.errors import ConfigError


def finished_result(config: TrainConfig, run_dir: Path) -> dict | None:
    """The result of a run of the same config that has finished in `run_dir`; None if one is to be started.

    Raises ConfigError, and changes nothing, if the directory holds another config's run or something else.
    """
    if not run_dir.exists():
        return None
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir}: is a file; choose a directory.")
    if (run_dir / rundir.SWEEP).exists():
        raise ConfigError(f"{run_dir} holds a sweep; choose another name= for a single run.")
    if not (run_dir / rundir.CONFIG).exists():
        if any(path.name != rundir.LOCK for path in run_dir.iterdir()):
            raise ConfigError(f"{run_dir} exists and is not a run directory; choose another name= or run_dir=.")
        return None
    result = rundir.read_result(run_dir)
    finished = result is not None and result["status"] == "completed"
    changed = differences(load(run_dir), config)
    if changed and (finished or (run_dir / rundir.METRICS).exists()):
        raise ConfigError(
            f"{run_dir} holds {'a finished' if finished else 'an unfinished'} run of another config; nothing was "
            f"changed. Choose another name=, or go back to its values: {'; '.join(changed)}."
        )
    return result if finished else None


def changed_since(path: str | None, result: Path) -> bool:
    """Whether the data file was written to after the run's result was."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_mtime > result.stat().st_mtime


def prepare(config: TrainConfig, run_dir: Path) -> IO[str]:
    """Lock the directory and write its config; the caller holds the returned lock while the worker runs.

    A run that goes on keeps what its worker had found out (precision, the model's commit, ...), on any machine.
    """
    lock = rundir.lock(run_dir)
    result = rundir.read_result(run_dir)
    if result is not None and result["status"] == "completed":
        lock.close()
        raise ConfigError(f"{run_dir} has just been finished by another process; nothing was changed.")
    if (run_dir / rundir.METRICS).exists():
        adopt_findings(config, load(run_dir))
    (run_dir / rundir.RESULT).unlink(missing_ok=True)
    save(config, run_dir)
    return lock
