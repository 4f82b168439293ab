"""Make a run directory ready for its worker, or say why nothing is to be done."""

import os
import sys
from pathlib import Path
from typing import IO

from llmkit import rundir
from llmkit.config import TrainConfig, adopt_findings, differences, load, other_config, save
from llmkit.errors import ConfigError
from llmkit.training.checkpoints.manifest import latest
from llmkit.training.checkpoints.mirror import publish
from llmkit.training.checkpoints.remote import RemoteRun, run_place
from llmkit.training.resuming import check_processes


def finished_result(config: TrainConfig, run_dir: Path) -> dict | None:
    """The result of a run of the same config that has finished in `run_dir`; None if one is to be started.

    Raises ConfigError, and changes nothing, if the directory holds another config's run or something else.
    """
    _refuse_strange(run_dir)
    if config.resume == "never":
        return None
    if not (run_dir / rundir.CONFIG).exists():
        return None
    result = rundir.read_result(run_dir)
    finished = _is_over(config, result)
    earlier = load(run_dir)
    changed = differences(earlier, config)
    if changed and (finished or _has_trained(run_dir)):
        what = f"{run_dir} holds {'a finished' if finished else 'an unfinished'} run"
        raise other_config(what, changed, go_on=latest(run_dir) is not None)
    if saved := latest(run_dir):
        check_processes(config, saved)
    if finished and _goes_further(earlier, config, run_dir):
        return None
    return result if finished else None


def finished_elsewhere(config: TrainConfig, run_dir: Path) -> tuple[str, dict] | None:
    """Where a run of the same config and name has finished and was mirrored, and its result; None if one is to start.

    Raises ConfigError if that place holds another config's run, StorageError if it does not answer.
    """
    place = run_place(config, run_dir)
    if place is None:
        return None
    remote = RemoteRun(place)
    earlier = remote.config()
    if earlier is None:
        return None
    if config.resume == "never":
        raise ConfigError(
            f"resume=never: {place.url} holds a run already, which a run that starts over would mix with; choose "
            "another name= or checkpoint.remote=, or remove it."
        )
    result = remote.result()
    if changed := differences(earlier, config):
        if result is None and not remote.checkpoints():  # nothing was trained that could be mixed up
            return None
        raise other_config(f"{place.url} holds a run", changed)
    finished = _is_over(config, result) and not config.resume_allow
    return (place.url, result) if result is not None and finished else None


def over_elsewhere(place: str, result: dict) -> str:
    """What is said of a run that is over and kept elsewhere."""
    if result.get("early_stop"):
        return _stopped_early(place, result)
    return f"{place} holds this run, finished; its model is in {place}/{rundir.FINAL}. Nothing to do."


def _stopped_early(place: str, result: dict) -> str:
    return f"{place} holds this run: {result['error']}. early_stop=none beside it goes on."


def _is_over(config: TrainConfig, result: dict | None) -> bool:
    """As `rundir.is_over`; a run that early_stop has ended goes on once early_stop=none is asked for."""
    if result is not None and config.early_stop.name == "none":
        return result["status"] == "completed"
    return rundir.is_over(result)


def is_finished(config: TrainConfig, run_dir: Path) -> bool:
    """Whether this run has finished, here or where it is mirrored; says so, and sends what is missing there.

    Raises ConfigError as `finished_result` and `finished_elsewhere` do.
    """
    if result := finished_result(config, run_dir):
        if result.get("early_stop"):
            print(_stopped_early(str(run_dir), result))
        else:
            value = "" if result["objective"] is None else f": {result['objective_name']} {result['objective']:.4g}"
            print(f"{run_dir} holds this run, finished{value}. Nothing to do.")
        if changed_since(config.data.path, run_dir / rundir.RESULT):
            print(f"warning: {config.data.path} has changed since; another name= trains on it.", file=sys.stderr)
        send_what_is_missing(config, run_dir)
        return True
    if elsewhere := finished_elsewhere(config, run_dir):
        print(over_elsewhere(*elsewhere))
        return True
    return False


def _refuse_strange(run_dir: Path) -> None:
    """Raise ConfigError for a place that is neither free nor a run's directory."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir}: is a file; choose a directory.")
    if (run_dir / rundir.SWEEP).exists():
        raise ConfigError(f"{run_dir} holds a sweep; choose another name= for a single run.")
    ours = (rundir.LOCK, rundir.RANKS)  # another machine of the run may have been started first
    if not (run_dir / rundir.CONFIG).exists() and any(path.name not in ours for path in run_dir.iterdir()):
        raise ConfigError(f"{run_dir} exists and is not a run directory; choose another name= or run_dir=.")


def _has_trained(run_dir: Path) -> bool:
    return (run_dir / rundir.METRICS).exists() or latest(run_dir) is not None


def _goes_further(earlier: TrainConfig, config: TrainConfig, run_dir: Path) -> bool:
    """Whether a finished run is to be trained on with what `resume_allow` lets differ. Raises ConfigError if it cannot.

    The same command once more changes nothing: the run is finished then.
    """
    allowed, config.resume_allow = config.resume_allow, []
    changed = differences(earlier, config)
    config.resume_allow = allowed
    if changed and latest(run_dir) is None:
        raise ConfigError(
            f"{run_dir} is finished and holds no checkpoint to go on from ({'; '.join(changed)}). init_from={run_dir} "
            "under another name= starts from its weights."
        )
    return bool(changed)


def send_what_is_missing(config: TrainConfig, run_dir: Path) -> None:
    """Bring the copy of a finished run up to date, if it is to have one and it is not complete.

    Raises NotCopied, or StorageError if the place does not answer.
    """
    place = run_place(config, run_dir)
    if place is None:
        return
    remote = RemoteRun(place)
    if remote.result() != rundir.read_result(run_dir):
        print(f"copy       {place.url} is not complete; sending what is missing")
        with rundir.lock(run_dir):
            publish(remote, run_dir, checkpoints=config.checkpoint.keep)
        print(f"copy       {place.url} is complete")


def changed_since(path: str | None, result: Path) -> bool:
    """Whether the data file was written to after the run's result was."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_mtime > result.stat().st_mtime


def prepare(config: TrainConfig, run_dir: Path) -> IO[str]:
    """Lock the directory and write its config; the caller holds the returned lock while the worker runs.

    A run that goes on keeps what its worker had found out (precision, the model's commit, ...), on any machine. With
    resume=never what is there is moved aside first.
    """
    lock = rundir.lock(run_dir)
    if config.resume == "never":
        _move_aside(run_dir)
    result = rundir.read_result(run_dir)
    if _is_over(config, result) and not config.resume_allow:
        lock.close()
        raise ConfigError(f"{run_dir} has just been finished by another process; nothing was changed.")
    if _has_trained(run_dir):
        adopt_findings(config, load(run_dir))
    for name in (rundir.RESULT, rundir.CANCEL):
        (run_dir / name).unlink(missing_ok=True)
    save(config, run_dir)
    return lock


def _move_aside(run_dir: Path) -> None:
    """Everything but the lock goes to `<run_dir>.before-1`, or the next free number: nothing is lost."""
    files = [path for path in run_dir.iterdir() if path.name != rundir.LOCK]
    if not files:
        return
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}{rundir.ASIDE}{number}")).exists():
        number += 1
    aside.mkdir()
    for path in files:
        os.replace(path, aside / path.name)
    print(f"resume     never: the run that was in {run_dir} is now in {aside}")
