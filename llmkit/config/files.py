"""`config.yaml` in a run directory: written, read back, and compared with what a new command asks for."""

import dataclasses
import re
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmkit import durable, rundir
from llmkit.config.nodes import NODES, TYPES_OF_OPTION, open_mappings, schema_keys
from llmkit.config.schema import DataConfig, TrainConfig
from llmkit.errors import ConfigError

# Where a run lives, how it is started, saved and watched is not what it computes.
NOT_COMPARED = (
    *("name", "run_dir", "resume", "resume_allow", "derived"),
    *("launcher", "checkpoint", "storage", "tracking", "serve", "export", "early_stop"),
    *("training.save_steps", "data.num_proc"),
    *("hardware.node_rank", "hardware.rendezvous"),
    *("hardware.name", "hardware.memory_gib", "hardware.precisions", "hardware.price_per_hour"),
)
# What decides which weights there are: a checkpoint with others cannot be loaded.
NEVER_ALLOWED = (
    *("recipe", "method", "qlora", "freeze", "model.hub_id", "data.special_tokens", "data.special_tokens_init"),
    *("lora.r", "lora.target_modules", "lora.modules_to_save", "lora.use_dora", "lora.bias"),
    "lora.layers_to_transform",
)
UNSET: tuple[Any, ...] = (None, "auto", {})
# Found on the hub by the worker, whatever the config says.
COMMITS = ("model.commit", "data.commit")
# May be sources of their own, with a commit among their keys.
SPLITS = ("validation", "test")


def save(config: TrainConfig, run_dir: Path) -> None:
    """Write `config` to `<run_dir>/config.yaml`, without its own place, so that the file repeats the run elsewhere."""
    values = dataclasses.asdict(config)
    del values["name"], values["run_dir"], values["sweeper"]
    values = _literal(values)
    head = f"# Repeat this run: llmkit train {run_dir / rundir.CONFIG}\n"
    durable.write_text(run_dir / rundir.CONFIG, head + OmegaConf.to_yaml(OmegaConf.create(values)))


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
                options = TYPES_OF_OPTION.get(name, {})
                schema[name] = OmegaConf.structured(options.get(values[name].get("name"), node) if options else node)
        config: Any = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from error
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{path} is not a run's config: {error}") from error
    config.run_dir = str(run_dir)
    return config


def recorded_values(run_dir: Path) -> dict[str, Any]:
    """What a run's config.yaml says, by dotted keys, in a fortieth of the time that `load` takes: nothing is checked.

    Raises ConfigError if there is none, or it is not YAML.
    """
    path = run_dir / rundir.CONFIG
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a run's config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a run's config.")
    return flat_values(values)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What `new` asks for that `old` did not, `key: old -> new`, one line each; `new.resume_allow` names exceptions.

    A value the worker had filled in differs from nothing while the new config leaves it open.
    """
    before, after = flat_values(dataclasses.asdict(old)), flat_values(dataclasses.asdict(new))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        left, right = before.get(key), after.get(key)
        left = _as_open_as(key, left, right, derived=old.derived)
        allowed = _among(key, new.resume_allow) and not _among(key, NEVER_ALLOWED)
        follows = key in old.derived and key in new.derived  # from another key, which is compared
        if left != right and not (_among(key, NOT_COMPARED) or allowed or follows):
            lines.append(f"{key}: {left} -> {right}")
    return lines


def other_config(what: str, changed: list[str], *, go_on: bool = True) -> ConfigError:
    """The answer to a command that differs from the run it would go on with.

    Args:
        what: what there is, as the beginning of a sentence that goes on with "another config".
        changed: what differs, see `differences`.
        go_on: whether there is anything to go on from.
    """
    keys = [line.partition(":")[0] for line in changed]
    ways = "go back to these values, or choose another name="
    if any(_among(key, NEVER_ALLOWED) for key in keys) or not go_on:
        ways += "; init_from=RUN under another name= starts from its weights"
    else:
        ways += f"; or go on all the same with 'resume_allow=[{','.join(keys)}]'"
    first = f"{what} of another config; nothing was changed. There -> asked for:"
    return ConfigError("\n  ".join([first, *changed, ways]))


def _among(key: str, named: Iterable[str]) -> bool:
    """Whether a key, or a node it lies in, is one of those named."""
    return any(key == name or key.startswith(f"{name}.") for name in named)


def _as_open_as(key: str, old: Any, new: Any, *, derived: list[str]) -> Any:
    """The old value of `key`, without what a worker had filled in and the new value leaves open."""
    if new in UNSET and (key in derived or key in COMMITS):
        return new
    if key in open_mappings() and isinstance(old, dict) and isinstance(new, dict):
        return {name: value for name, value in old.items() if name in new or f"{key}.{name}" not in derived}
    if key == "data.datasets":
        left_open = [one["commit"] is None for one in new] + [False] * len(old)
        return [one | {"commit": None} if is_open else one for one, is_open in zip(old, left_open, strict=False)]
    if key in [f"data.{name}" for name in SPLITS] and isinstance(old, dict) and isinstance(new, dict):
        return {name: value for name, value in old.items() if name != "commit" or name in new}
    return old


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
        ours, theirs = (_node(one, node) for one in (config, earlier))
        if ours is None or theirs is None:
            continue
        if isinstance(ours, dict):
            adopted = name not in ours and name in theirs
            ours |= {name: theirs[name]} if adopted else {}
        elif adopted := getattr(ours, name) in UNSET:
            setattr(ours, name, getattr(theirs, name))
        if adopted and key in earlier.derived and key not in config.derived:
            config.derived.append(key)
    _adopt_commits(config.data, earlier.data)


def _node(config: TrainConfig, name: str) -> Any:
    """A node of the config, or a mapping in one, by its dotted name; the config itself without a name."""
    return attrgetter(name)(config) if name else config


def _adopt_commits(ours: DataConfig, theirs: DataConfig) -> None:
    """Those of sources within `data`; its own is one of COMMITS."""
    for source, earlier in zip(ours.datasets, theirs.datasets, strict=False):
        source.commit = source.commit or earlier.commit
    for name in SPLITS:
        value, before = getattr(ours, name), getattr(theirs, name)
        if isinstance(value, dict) and isinstance(before, dict) and before.get("commit"):
            setattr(ours, name, {"commit": before["commit"]} | value)


def flat_values(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config, or of a node called `prefix`, by their dotted keys."""
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in schema_keys():
            flat.update(flat_values(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
