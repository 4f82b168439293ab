"""Go on with a run that was interrupted: `llmkit resume [RUN_DIR] [KEY=VALUE ...]`."""

import sys
from pathlib import Path

from llmkit import rundir, train
from llmkit.cli import guarded
from llmkit.config import save
from llmkit.errors import EXIT_DONE, ConfigError

HELP = """\
llmkit resume [RUN_DIR] [KEY=VALUE ...]

Goes on with a run as its own config.yaml says, from its newest whole checkpoint, as if it had never been interrupted.
Without RUN_DIR: the newest unfinished run under runs/. A run that is finished says so.

  RUN_DIR     a run's directory; or s3://bucket/.../NAME, where checkpoint.remote kept it: it goes on in runs/NAME
  KEY=VALUE   what does not change the result (checkpoint.keep=5, tracking=none); anything else with resume_allow=[KEY]

Examples:
  llmkit resume
  llmkit resume runs/alpha
  llmkit resume runs/alpha training.max_steps=2000 resume_allow=[training.max_steps]
  llmkit resume s3://bucket/runs/alpha"""


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_resume, argv)


def _resume(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    named = bool(argv) and "=" not in argv[0] and not argv[0].startswith("-")
    run_dir = _run_directory(argv[0]) if named else newest_unfinished(Path("runs"))
    words = argv[1:] if named else argv
    return train.main([str(run_dir / rundir.CONFIG), f"run_dir={run_dir}", *words])


def _run_directory(word: str) -> Path:
    if "://" in word:
        return _from_bucket(word.rstrip("/"))
    run_dir = Path(word).expanduser()
    if run_dir.name == rundir.CONFIG:
        run_dir = run_dir.parent
    if (run_dir / rundir.SWEEP).exists():
        raise ConfigError(f"{run_dir} holds a sweep; the same sweep command again runs what is missing of it.")
    if not (run_dir / rundir.CONFIG).exists():
        raise ConfigError(
            f"{run_dir} is not a run directory: it holds no {rundir.CONFIG}.{_known_runs(run_dir.parent)}"
        )
    return run_dir


def _from_bucket(url: str) -> Path:
    """runs/NAME for the run that checkpoint.remote keeps at `.../NAME`, with the config it has there."""
    from llmkit.config.schema import StorageConfig
    from llmkit.storage import open_place
    from llmkit.training.checkpoints.remote import RemoteRun

    config = RemoteRun(open_place(url, StorageConfig())).config()
    if config is None:
        raise ConfigError(f"{url} holds no run: there is no {rundir.CONFIG} there.")
    above, _, name = url.rpartition("/")
    run_dir = Path("runs") / name
    if not (run_dir / rundir.CONFIG).exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        config.checkpoint.remote = above
        save(config, run_dir)
    return run_dir


def newest_unfinished(runs: Path) -> Path:
    """The run below `runs` that was last at work and has not finished. Raises ConfigError if there is none."""
    unfinished = [path for path in _runs(runs) if (rundir.read_result(path) or {}).get("status") != "completed"]
    if not unfinished:
        raise ConfigError(f"{runs.absolute()} holds no unfinished run; say which: llmkit resume RUN_DIR.")
    newest = max(unfinished, key=_last_at_work)
    print(f"resume     {newest}: the newest unfinished run")
    return newest


def _runs(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob(f"*/{rundir.CONFIG}"))


def _last_at_work(run_dir: Path) -> float:
    files = (run_dir / rundir.METRICS, run_dir / rundir.CONFIG)
    return max(path.stat().st_mtime for path in files if path.exists())


def _known_runs(runs: Path) -> str:
    names = [path.name for path in _runs(runs)]
    return f" Runs there: {', '.join(names[-10:])}." if names else ""


if __name__ == "__main__":
    sys.exit(main())
