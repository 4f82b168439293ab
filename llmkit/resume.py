"""Go on with a run that was interrupted: `llmkit resume [RUN_DIR] [KEY=VALUE ...]`."""

import sys
from pathlib import Path

from llmkit import rundir, train
from llmkit.cli import guarded
from llmkit.config import load, save
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
    named = bool(argv) and _names_a_run(argv[0])
    words = argv[1:] if named else argv
    if named and "://" in argv[0]:
        run_dir = _from_bucket(argv[0].rstrip("/"), words)
        if run_dir is None:
            return EXIT_DONE
    else:
        run_dir = _run_directory(argv[0]) if named else newest_unfinished(Path("runs"))
    return train.main([str(run_dir / rundir.CONFIG), f"run_dir={run_dir}", *_origin_of(run_dir), *words])


def _origin_of(run_dir: Path) -> list[str]:
    """Where a run that has no checkpoint of its own yet was to go on from, if from anywhere."""
    from llmkit.training.checkpoints.manifest import latest

    config = load(run_dir)
    if config.resume in ("auto", "never") or latest(run_dir) is not None:
        return []
    return [f"resume={config.resume}", f"resume_allow=[{','.join(config.resume_allow)}]"]


def _names_a_run(word: str) -> bool:
    """A sweep's jobs are called KEY=VALUE, as overrides are."""
    return not word.startswith("-") and ("=" not in word or "://" in word or Path(word).expanduser().exists())


def _run_directory(word: str) -> Path:
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


def _from_bucket(url: str, words: list[str]) -> Path | None:
    """runs/NAME for the run that checkpoint.remote keeps at `.../NAME`, with the config it has there; None: finished.

    Raises ConfigError if there is no run, or runs/NAME is something else.
    """
    from llmkit.config.arguments import storage_of
    from llmkit.launchers.prepare import over_elsewhere
    from llmkit.storage import open_place
    from llmkit.training.checkpoints.remote import RemoteRun

    storage = storage_of(words)
    remote = RemoteRun(open_place(url, storage))
    config = remote.config()
    if config is None:
        names = remote.place.files() if url.count("/") > 2 else {}
        runs = sorted(folder for folder, _, file in (name.partition("/") for name in names) if file == rundir.CONFIG)
        below = f" Runs below it: {', '.join(runs[:10])}." if runs else ""
        raise ConfigError(f"{url} holds no run: there is no {rundir.CONFIG} there.{below}")
    result = remote.result()
    if result is not None and rundir.is_over(result) and not words:
        print(over_elsewhere(url, result))
        return None
    above, _, name = url.rpartition("/")
    run_dir = Path("runs") / name
    if (run_dir / rundir.CONFIG).exists():
        if (load(run_dir).checkpoint.remote or "").rstrip("/") != above:
            raise ConfigError(
                f"{run_dir} is another run, not the one at {url}. Go on in another directory, or move it away."
            )
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir} exists and is not a run directory; go on in another directory, or move it away.")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        config.checkpoint.remote, config.storage = above, storage
        # Whoever can write to the bucket could have said so.
        config.checkpoint.trust = config.model.trust_remote_code = False
        save(config, run_dir)
    return run_dir


def newest_unfinished(runs: Path) -> Path:
    """The run below `runs` that was last at work and has not finished. Raises ConfigError if there is none."""
    unfinished = [path for path in _runs(runs) if not rundir.is_over(rundir.read_result(path))]
    at_work = [path for path in unfinished if rundir.is_locked(path)]
    unfinished = [path for path in unfinished if path not in at_work]
    if not unfinished:
        also = f" (at work now: {', '.join(path.name for path in at_work)})" if at_work else ""
        raise ConfigError(f"{runs.absolute()} holds no unfinished run{also}; say which: llmkit resume RUN_DIR.")
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
