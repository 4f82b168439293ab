"""`config.yaml` in a run directory: written, read back, and compared with what a new command asks for."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llmkit import rundir
from llmkit.config.schema import NODES, SourceConfig, TrainConfig, schema_keys
from llmkit.errors import ConfigError

# Where a run lives and how it is started is not what it computes.
NOT_COMPARED = ("name", "run_dir", "derived", "launcher")
UNSET: tuple[Any, ...] = (None, "auto", {})
# Found on the hub by the worker, whatever the config says.
COMMITS = ("model.commit", "data.commit")


def save(config: TrainConfig, run_dir: Path) -> None:
    """Write `config` to `<run_dir>/config.yaml`, without its own place, so that the file repeats the run elsewhere."""
    values = dataclasses.asdict(config)
    del values["name"], values["run_dir"]
    values = _literal(values)
    head = f"# Repeat this run: llmkit train {run_dir / rundir.CONFIG}\n"
    partial = run_dir / f".{rundir.CONFIG}.{os.getpid()}"
    partial.write_text(head + OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
    os.replace(partial, run_dir / rundir.CONFIG)


def load(run_dir: Path) -> TrainConfig:
    """The typed config of a run. Raises ConfigError if there is none or it does not fit the schema."""
    path = run_dir / rundir.CONFIG
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it holds no {rundir.CONFIG}.")
    try:
        values: Any = OmegaConf.load(path)
        schema = OmegaConf.structured(TrainConfig)
        for name, node in NODES.items():
            if values.get(name) is not None:
                schema[name] = OmegaConf.structured(node)
        config: Any = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from error
    except (YAMLError, AttributeError) as error:
        raise ConfigError(f"{path} is not a run's config: {error}") from error
    config.run_dir = str(run_dir)
    return config


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What `new` asks for that `old` did not: `key: old -> new`, one line each.

    A value the worker had filled in differs from nothing while the new config leaves it open.
    """
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        left, right = before.get(key), after.get(key)
        filled_in = right in UNSET and (key in old.derived or key in COMMITS)
        if key == "data.datasets":
            left = _as_open_as(left, right)
        if left != right and not filled_in and key.split(".")[0] not in NOT_COMPARED:
            lines.append(f"{key}: {left} -> {right}")
    return lines


def _as_open_as(old: Any, new: Any) -> list[dict[str, Any]]:
    """The old sources without the commits that the new ones leave to be found."""
    left_open = [one["commit"] is None for one in new] + [False] * len(old)
    return [one | {"commit": None} if is_open else one for one, is_open in zip(old, left_open, strict=False)]


def _literal(value: Any) -> Any:
    """`value` with every `${` escaped: what has been resolved must not be read as an interpolation again."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def adopt_findings(config: TrainConfig, earlier: TrainConfig) -> None:
    """Fill in what `config` leaves open with what an earlier worker of the same run had found, in place."""
    for key in (*earlier.derived, *COMMITS):
        node, _, name = key.rpartition(".")
        ours, theirs = (getattr(one, node) if node else one for one in (config, earlier))
        if ours is not None and theirs is not None and getattr(ours, name) in UNSET:
            setattr(ours, name, getattr(theirs, name))
            if key in earlier.derived and key not in config.derived:
                config.derived.append(key)
    _adopt_commits(config.data.datasets, earlier.data.datasets)


def _adopt_commits(ours: list[SourceConfig], theirs: list[SourceConfig]) -> None:
    for source, earlier in zip(ours, theirs, strict=False):
        source.commit = source.commit or earlier.commit


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in schema_keys():
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
