"""Copy what a run has made to another place: `llmkit export run=RUN_DIR to=PLACE [checkpoints=true]`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit import rundir
from llmkit.cli import guarded
from llmkit.config import TrainConfig, differences, load
from llmkit.errors import EXIT_DONE, ConfigError, did_you_mean

if TYPE_CHECKING:
    from llmkit.training.checkpoints.remote import RemoteRun

HELP = """\
llmkit export run=RUN_DIR to=PLACE [checkpoints=true]

Copies a run to PLACE, s3://bucket/path or a directory: its model (final/), config, metrics and result. What is there
already with the same content is not sent again; every file is verified after it was sent.

  run          a run's directory
  to           the directory of the copy; where checkpoint.remote is set: <checkpoint.remote>/NAME
  checkpoints  true: the checkpoints too, so that another machine can go on with the run (llmkit resume PLACE)

Example:
  llmkit export run=runs/alpha to=s3://bucket/runs/alpha checkpoints=true"""

KEYS = {"run": "RUN_DIR", "to": "PLACE", "checkpoints": "true"}


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_export, argv)


def _export(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    settings = _settings(argv)
    from llmkit.storage import open_place
    from llmkit.training.checkpoints.mirror import publish
    from llmkit.training.checkpoints.remote import RemoteRun

    run_dir = Path(settings["run"]).expanduser()
    config = load(run_dir)
    place = open_place(settings["to"], config.storage)
    checkpoints = None if settings.get("checkpoints") == "true" else 0
    with rundir.lock(run_dir):  # a run at work changes what is copied
        if not (run_dir / rundir.FINAL).is_dir() and checkpoints == 0:
            raise ConfigError(f"run={run_dir} has no {rundir.FINAL}/ yet; checkpoints=true copies its checkpoints.")
        _refuse_other(RemoteRun(place), config)
        publish(RemoteRun(place), run_dir, checkpoints=checkpoints)
    print(f"{place.url} holds {run_dir}")
    return EXIT_DONE


def _refuse_other(there: "RemoteRun", config: TrainConfig) -> None:
    """Raise ConfigError if the place holds another run, or something else."""
    other = there.config()
    if other is not None and (changed := differences(other, config)):
        raise ConfigError(f"to={there.place.url} holds another run ({'; '.join(changed)}); choose another to=.")
    if other is None and there.place.files():
        raise ConfigError(f"to={there.place.url} holds other files; choose another to=.")


def _settings(argv: list[str]) -> dict[str, str]:
    """The words of the command line by key. Raises ConfigError with all that is wrong with them."""
    settings: dict[str, str] = {}
    problems = []
    for word in argv:
        key, _, value = word.partition("=")
        if key not in KEYS:
            near = did_you_mean(key, KEYS)
            problems.append(f"{word}: export takes {', '.join(f'{known}=' for known in KEYS)}.{near}")
        elif not value:
            problems.append(f"{key}: needs a value: {key}={KEYS[key]}.")
        else:
            settings[key] = value
    if settings.get("checkpoints", "false") not in ("true", "false"):
        problems.append(f"checkpoints={settings['checkpoints']}: true or false.")
    for key in ("run", "to"):
        if key not in settings and not problems:
            problems.append(f"{key}={KEYS[key]} is missing; see llmkit export --help.")
    if problems:
        raise ConfigError(*problems)
    return settings


if __name__ == "__main__":
    sys.exit(main())
