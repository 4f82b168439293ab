"""What a run goes on from: looked up before anything else, brought here if it is elsewhere, said in one line."""

import os
from pathlib import Path
from typing import Any

from llmkit import config as configuration
from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.errors import ConfigError
from llmkit.storage import Place, open_place
from llmkit.storage.errors import DamagedError, StorageError
from llmkit.training.checkpoints import manifest
from llmkit.training.checkpoints.remote import RemoteRun, read_config, run_place
from llmkit.training.console import RunConsole

OWN = ("auto", "never")


def bring_checkpoint(config: TrainConfig, run_dir: Path, console: RunConsole) -> Path | None:
    """The checkpoint that the run goes on from, one of its own by now and whole to the last byte; None to start.

    Raises:
        ConfigError: `resume` names no checkpoint, or one of another config.
        StorageError: the place did not answer as it should. "Not there" is an answer; nothing else starts afresh.
    """
    manifest.remove_leftovers(run_dir)
    own, why = newest_whole(run_dir, console), "its newest checkpoint"
    if config.resume != "never" and (place := run_place(config, run_dir)) is not None:
        own, why = _newer_of(own, RemoteRun(place), config, run_dir, console)
    if own is None and config.resume not in OWN:
        own, why = _from_elsewhere(config, run_dir, console), f"resume={config.resume}"
    if own is None:
        console.fact("start", "a new run: there is no checkpoint to go on from")
    else:
        console.fact("resume", f"goes on from step {manifest.step_of(own)} ({why})")
    return own


def bring_to_machine(checkpoint: Path, config: TrainConfig, run_dir: Path, console: RunConsole) -> None:
    """Have the run's checkpoint on this machine too, where its disk is not one that the first machine sees.

    Raises ConfigError if there is nowhere to take it from.
    """
    if checkpoint.exists():
        return
    there = bring_checkpoint(config, run_dir, console) if run_place(config, run_dir) else None
    if there != checkpoint:
        raise ConfigError(
            f"{os.uname().nodename} does not see {checkpoint}, which the run goes on from: put run_dir= on a disk that "
            "all machines share, or give the run a copy that they reach, checkpoint.remote=s3://..."
        )


def newest_whole(run_dir: Path, console: RunConsole) -> Path | None:
    """The newest checkpoint of a run that is as it was written; damaged ones are set aside with a warning."""
    for checkpoint in manifest.named(run_dir):
        try:
            manifest.verify(checkpoint)
        except manifest.DamagedCheckpoint as error:
            console.warn(f"{error}; it is left in {manifest.set_aside(checkpoint).name}, and the one before is taken.")
        else:
            return checkpoint
    return None


def _newer_of(
    own: Path | None, remote: RemoteRun, config: TrainConfig, run_dir: Path, console: RunConsole
) -> tuple[Path | None, str]:
    there = remote.checkpoints()
    damaged = None
    for step in reversed(there):
        if own is not None and manifest.step_of(own) >= step:
            break
        _check_config(remote.place.place(f"{rundir.CHECKPOINTS}/{manifest.name_of(step)}"), config, run_dir)
        try:
            return _fetch(remote, step, there[step], config, run_dir, console), f"the newest at {remote.place.url}"
        except DamagedError as error:
            damaged = error
            console.warn(f"{error} The one before is taken.")
    if own is None and damaged is not None:
        raise StorageError(
            f"{remote.place.url}: every checkpoint of this run is damaged. Another name= starts afresh."
        ) from damaged
    return own, "its newest checkpoint"


def _from_elsewhere(config: TrainConfig, run_dir: Path, console: RunConsole) -> Path:
    """The checkpoint that `resume` names: that of a run, or one checkpoint's directory."""
    place, step = _run_and_step(config.resume, config)
    remote = RemoteRun(place)
    there = remote.checkpoints()
    if not there or (step is not None and step not in there):
        near = f" Complete ones there: {', '.join(map(str, there))}." if there else ""
        raise ConfigError(
            f"resume={config.resume}: {place.url} holds no complete checkpoint; name a run's directory, one of its "
            f"checkpoints, or auto.{near}"
        )
    step = max(there) if step is None else step
    _check_config(place.place(f"{rundir.CHECKPOINTS}/{manifest.name_of(step)}"), config, run_dir)
    return _fetch(remote, step, there[step], config, run_dir, console)


def _run_and_step(resume: str, config: TrainConfig) -> tuple[Place, int | None]:
    """The run that `resume` names, and the step if it names one checkpoint."""
    parts = resume.rstrip("/").split("/")
    if (match := manifest.STEP.fullmatch(parts[-1])) and parts[-2:-1] == [rundir.CHECKPOINTS]:
        return open_place("/".join(parts[:-2]) or ".", config.storage), int(match[1])
    return open_place(resume.rstrip("/") or "/", config.storage), None


def _check_config(checkpoint: Place, config: TrainConfig, run_dir: Path) -> None:
    """Compare with the config that the checkpoint was made with, which it holds."""
    earlier = read_config(checkpoint)
    if earlier is None:
        raise ConfigError(f"{checkpoint.url} holds no {rundir.CONFIG}; it is not llmkit's.")
    if changed := configuration.differences(earlier, config):
        raise configuration.other_config(f"{checkpoint.url} was saved by a run", changed)
    configuration.adopt_findings(config, earlier)
    configuration.save(config, run_dir)


def _fetch(
    remote: RemoteRun, step: int, saved: dict[str, Any], config: TrainConfig, run_dir: Path, console: RunConsole
) -> Path:
    size = sum(about["size"] for about in saved["files"].values())
    console.fact("fetching", f"step {step} from {remote.place.url}, {size / 1e6:,.0f} MB")
    return remote.fetch(step, saved, run_dir, trust=config.checkpoint.trust or not remote.place.url.startswith("s3:"))
