"""Which model a command means: `run=`, one of its checkpoints, `sweep=`, `model=`, or the newest finished run.

    target = find_target({"run": "runs/alpha"}, config)

It reads JSON and YAML only, and of a bucket the files it needs; it never imports torch.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config import TrainConfig, load
from llmkit.config.init_from import ADAPTER_CONFIG, MODEL_CONFIG
from llmkit.config.schema import FIGURES_OF_RECIPE, ModelConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.remote import files_at, is_remote, joined, local_copy, split_address

# The words that say which model is meant; a verb's own, beside model=.
KEYS = {"run": "RUN_DIR", "sweep": "DIR"}
RUNS = Path("runs")
OTHERS = RUNS / "served"  # where files about a model that is no run of this machine go
CHECKPOINT = re.compile(r"step-(\d{8,})")
MAXIMIZED = {name for names in FIGURES_OF_RECIPE.values() for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model that can be loaded: a whole one, or what was trained of it and the base that belongs to it."""

    name: str  # what requests call it: the run's name, or the model's
    said: str  # as the user would name it again: run=runs/alpha
    source: str  # hub id or directory of a whole model; else the directory of the adapter or of the trained weights
    adapter: dict[str, Any] | None  # adapter_config.json, where `source` is an adapter
    base: ModelConfig  # what an adapter or trained weights belong to; a whole model itself
    run: TrainConfig | None  # the config of the run that made it
    home: Path  # where files about it go on this machine: the run's directory, where there is one
    records: str = ""  # where that run's own files lie: its directory or its address in a bucket
    step: int | None = None  # of a checkpoint
    is_partial: bool = False  # a checkpoint of method=freeze: the trained weights alone, which belong to `base`

    @property
    def is_whole(self) -> bool:
        """Whether `source` is all that is to be loaded."""
        return self.adapter is None and not self.is_partial


def dtype_of(precision: str) -> str:
    """The dtype that a run of this precision computes in, by torch's name; all but two train on bfloat16."""
    return {"fp32": "float32", "fp16": "float16"}.get(precision, "bfloat16")


def find_target(words: dict[str, str], config: TrainConfig) -> Target:
    """The model that `words` (a verb's own: run, sweep) and the config's `model` mean.

    Args:
        config: composed from the command line; its model counts where `model` was chosen there and no run is named.

    Raises:
        ConfigError: if there is none, or not yet.
        StorageError: if a bucket does not answer.
    """
    if "run" in words:
        return of_run(words["run"])
    if "sweep" in words:
        return of_run(best_of_sweep(Path(words["sweep"]).expanduser()))
    if config.model.path or config.model.hub_id:
        return of_model(config.model)
    return of_run(newest_finished(RUNS))


def of_model(model: ModelConfig) -> Target:
    """A model as it is, from the hub, its cache, a directory or a bucket."""
    name = model.name if model.name != "custom" else (model.path or model.hub_id or "").rstrip("/").rpartition("/")[2]
    if model.path and is_remote(model.path):
        source, said = str(local_copy(model.path)), f"model.path={model.path}"
    elif model.path:
        source, said = model.path, f"model.path={model.path}"
        if not Path(source, MODEL_CONFIG).is_file():
            adapter = Path(source, ADAPTER_CONFIG).is_file()
            raise ConfigError(f"{said}: " + (f"an adapter; run={source}." if adapter else f"no {MODEL_CONFIG} there."))
    elif model.hub_id:
        source, said = model.hub_id, f"model={model.name if model.name != 'custom' else model.hub_id}"
    else:
        from llmkit.model.source import model_source

        source, said = model_source(model), f"model={model.name}"
    return Target(name=name, said=said, source=source, adapter=None, base=model, run=None, home=OTHERS / name)


def of_run(run: str | Path) -> Target:
    """A finished run, one of its checkpoints, its merged/, or a directory that is itself a model or an adapter.

    Raises ConfigError if it is none of these, or unfinished.
    """
    address = str(run).rstrip("/") if is_remote(str(run)) else str(Path(run).expanduser().absolute())
    said = f"run={run}"
    above, name = split_address(address) if is_remote(address) else (str(Path(address).parent), Path(address).name)
    if name == rundir.FINAL and _has(above, rundir.CONFIG):
        address, (above, name) = above, (str(Path(above).parent), above.rpartition("/")[2])
    if CHECKPOINT.fullmatch(name):
        return _of_checkpoint(address, said)
    if not is_remote(address) and not Path(address).is_dir():
        siblings = Path(above).iterdir() if Path(above).is_dir() else ()
        near = did_you_mean(name, [path.name for path in siblings])
        raise ConfigError(f"{said}: there is no such directory (seen from {Path.cwd()}).{near}")
    if _has(address, rundir.SWEEP):
        raise ConfigError(f"{said}: a sweep; sweep={run} takes its best run.")
    if not _has(address, rundir.CONFIG):
        return _of_files(address, said, name)
    status = (_json(address, rundir.RESULT) or {}).get("status")
    if status != "completed":
        raise ConfigError(
            f"{said}: this run is not finished (its status: {status or 'unfinished'}); llmkit resume {run} goes on "
            f"with it, and run={run}/{rundir.CHECKPOINTS}/step-... is what it has so far."
        )
    folder = joined(address, rundir.FINAL)
    if not _has(folder, ADAPTER_CONFIG) and not _has(folder, MODEL_CONFIG):
        raise ConfigError(f"{said}: this run has no {rundir.FINAL}/: its weights are not there any more.")
    config = _config(address)
    return _made_by(config, _local(folder), name=name, said=said, place=address)


def _of_checkpoint(address: str, said: str) -> Target:
    from llmkit.training.checkpoints.manifest import MANIFEST

    if not _has(address, MANIFEST):
        raise ConfigError(f"{said}: not a checkpoint, or not a whole one (it has no {MANIFEST}).")
    directory = _local(address)
    run_dir = address.rpartition(f"/{rundir.CHECKPOINTS}/")[0]
    run, step = run_dir.rpartition("/")[2], address.rpartition("/")[2]
    return _made_by(_config(address), directory, name=f"{run}-{step}", said=said, place=run_dir)


def _made_by(config: TrainConfig, directory: Path, *, name: str, said: str, place: str) -> Target:
    """What the run of this config at `place` has saved in `directory`."""
    adapter = rundir.read_json(directory / ADAPTER_CONFIG)
    found = CHECKPOINT.fullmatch(directory.name)
    partial = adapter is None and config.method.name == "freeze" and found is not None
    base = config.model
    if adapter is None and not partial:
        base = ModelConfig(path=str(directory), trust_remote_code=base.trust_remote_code)
    return Target(
        name=name,
        said=said,
        source=str(directory),
        adapter=adapter,
        base=base,
        run=config,
        home=OTHERS / name if is_remote(place) else Path(place),
        records=place,
        step=int(found[1]) if found else None,
        is_partial=partial,
    )


def _of_files(address: str, said: str, name: str) -> Target:
    """A directory with a model or an adapter that no run's config speaks of."""
    if not _has(address, MODEL_CONFIG) and not _has(address, ADAPTER_CONFIG):
        raise ConfigError(
            f"{said}: neither a run ({rundir.CONFIG}), nor a model ({MODEL_CONFIG}), nor an adapter ({ADAPTER_CONFIG})."
        )
    directory = _local(address)
    adapter = rundir.read_json(directory / ADAPTER_CONFIG)
    base = ModelConfig(path=str(directory))
    if adapter is not None:
        named = adapter.get("base_model_name_or_path")
        if not named:
            raise ConfigError(f"{said}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path).")
        is_path = is_remote(named) or Path(named).is_dir()
        base = ModelConfig(path=named) if is_path else ModelConfig(hub_id=named)
        base.revision = adapter.get("revision") or "main"
    home = OTHERS / name
    return Target(name=name, said=said, source=str(directory), adapter=adapter, base=base, run=None, home=home)


def newest_finished(runs: Path) -> Path:
    """The run below `runs` (or below a sweep in it) that finished last. Raises ConfigError if there is none."""
    finished = []
    for result in [*runs.glob(f"*/{rundir.RESULT}"), *runs.glob(f"*/*/{rundir.RESULT}")]:
        status = (rundir.read_result(result.parent) or {}).get("status")
        if status == "completed" and (result.parent / rundir.FINAL).is_dir():
            finished.append((result.stat().st_mtime_ns, result.parent))
    if not finished:
        raise ConfigError(
            f"there is no finished run under {runs.absolute()}: llmkit train makes one; or name a model: run=RUN_DIR, "
            "model=NAME, model.path=DIR."
        )
    return max(finished)[1]


def best_of_sweep(directory: Path) -> Path:
    """The directory of the run that its sweep ranks first. Raises ConfigError if the sweep has none to show."""
    return ranked_runs(directory)[0]


def ranked_runs(directory: Path) -> list[Path]:
    """The finished runs of a sweep, the best first. Raises ConfigError if there is none."""
    if str(directory).startswith("s3:"):
        raise ConfigError(
            "sweep=s3://...: a sweep is read from a directory; of one in a bucket name a run, run=s3://..."
        )
    sweep = rundir.read_json(directory / rundir.SWEEP)
    if sweep is None:
        hint = f"; run={directory}" if (directory / rundir.CONFIG).exists() else ""
        raise ConfigError(f"sweep={directory}: holds no {rundir.SWEEP}{hint}.")
    completed = [job for job in sweep["jobs"] if job["status"] == "completed" and job["objective"] is not None]
    done = [job for job in completed if math.isfinite(job["objective"])]
    if not done:
        raise ConfigError(
            f"sweep={directory}: none of its {len(sweep['jobs'])} runs is finished with a figure to rank by."
        )
    done.sort(key=lambda job: job["objective"], reverse=sweep["objective"] in MAXIMIZED)
    return [_run_of(job["run_dir"], directory) for job in done]


def _run_of(run_dir: str, sweep: Path) -> Path:
    """A job's directory; a sweep that was moved still has its runs beside sweep.json."""
    beside = sweep / Path(run_dir).name
    return beside if beside.is_dir() else Path(run_dir)


def _has(address: str, name: str) -> bool:
    return name in files_at(address) if is_remote(address) else Path(address, name).is_file()


def _local(address: str) -> Path:
    return local_copy(address) if is_remote(address) else Path(address)


def _json(address: str, name: str) -> dict[str, Any] | None:
    if not is_remote(address):
        return rundir.read_json(Path(address, name))
    if name not in files_at(address):
        return None
    return json.loads((local_copy(address, [name]) / name).read_text(encoding="utf-8"))


def _config(address: str) -> TrainConfig:
    return load(local_copy(address, [rundir.CONFIG]) if is_remote(address) else Path(address))
