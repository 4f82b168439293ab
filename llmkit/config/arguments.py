"""From what a user types to what Hydra's grammar reads.

A user's own YAML becomes overrides in front of those on the command line, so that one path checks and explains both.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from llmkit.config.registration import group_names, group_options
from llmkit.config.schema import METHOD_NODES, TrainConfig
from llmkit.errors import ConfigError, did_you_mean

# Hydra's switches that take a value.
SWITCHES_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn")
SWITCHES_WITH_VALUE += ("--config-dir", "-cd", "--experimental-rerun")
MULTIRUN = ("-m", "--multirun")

# A value that Hydra's grammar reads as it stands, or that its user has quoted or bracketed already.
PLAIN_VALUE = re.compile(r"""[\w./:+@%*?|-]*|'.*'|".*"|\[.*\]|\{.*\}""")


@dataclass
class Arguments:
    """The command line, sorted: Hydra's switches and the overrides, ready for Hydra."""

    switches: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    multirun: bool = False

    def to_argv(self) -> list[str]:
        """-m goes first: Hydra 1.3 parses its positionals in one piece (hydra#2488)."""
        return [*(["--multirun"] if self.multirun else []), *self.switches, *self.overrides]


def parse_arguments(argv: list[str]) -> Arguments:
    """Sort switches from overrides, read config files, and make every value one that Hydra's grammar takes.

    Raises ConfigError for a missing or broken file and for words that are neither.
    """
    arguments, typed, words = Arguments(), [], iter(argv)
    for word in words:
        if word in MULTIRUN:
            arguments.multirun = True
        elif word.startswith("-"):
            arguments.switches.append(word)
            if word in SWITCHES_WITH_VALUE:
                arguments.switches.extend(value for value in [next(words, None)] if value is not None)
        else:
            typed.append(word)
    from_files = []
    while typed and "=" not in typed[0] and typed[0].endswith((".yaml", ".yml")):
        from_files += file_overrides(Path(typed.pop(0)))
    for word in typed:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(
                f"'{word}' is not an override: write KEY=VALUE, for example model=mistral7b or lora.r=16. "
                "A config file (.yaml) comes first."
            )
    quoted = [quote_path(word, multirun=arguments.multirun) for word in typed]
    arguments.overrides = imply_groups(last_choice_wins(from_files + expand_hub_models(quoted)))
    return arguments


def split_override(override: str) -> tuple[str, str]:
    """`key=value` -> (key, value); the prefixes `+` and `++` are taken off the key."""
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def path_keys() -> set[str]:
    """The dotted keys whose values are paths or URLs."""
    return {"name"} | {key for key, info in walk_schema() if info.metadata.get("path")}


def walk_schema(node: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of the schema as (dotted key, dataclass field), the nodes of all methods included."""
    for info in fields(node):
        inner = METHOD_NODES.get(info.name) if node is TrainConfig else None
        inner = inner or (info.type if is_dataclass(info.type) else None)
        if inner:
            yield from walk_schema(inner, f"{prefix}{info.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{info.name}", info


def quote_path(override: str, *, multirun: bool) -> str:
    """Quote the value of a path-valued key, so that `=`, commas and spaces reach it as typed.

    In a sweep a comma separates values, unless the whole is the name of something that exists.
    """
    key, value = split_override(override)
    if key not in path_keys() or PLAIN_VALUE.fullmatch(value):
        return override
    if multirun and re.match(r"(choice|glob|range|shuffle|sort|interval)\(", value):
        return override
    items = value.split(",") if multirun and not Path(value).exists() else [value]
    return override[: -len(value)] + ",".join(to_grammar(item) if not _is_number(item) else item for item in items)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|null", text) is not None


def to_grammar(value: Any) -> str:
    """A Python value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(to_grammar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{to_grammar(item)}" for key, item in value.items()) + "}"
    text = str(value)
    # In Hydra's quoted strings a backslash escapes only a quote, or backslashes in front of one.
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    text = re.sub(r"(\\+)$", lambda match: match[1] * 2, text)
    return f"'{text}'"


def file_overrides(path: Path) -> list[str]:
    """The keys of a user's YAML file (or of a run's config.yaml) as overrides.

    Raises ConfigError if the file is missing, is not YAML or is not a mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise ConfigError(f"The config file {path} does not exist.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no KEY: VALUE lines; write for example `model: mistral7b`.")
    derived = set(content.pop("derived", []))
    choices, values = [], []
    for key, value in content.items():
        if key in group_names():
            option = value.get("name") if isinstance(value, dict) else value
            if option is not None and (not isinstance(value, dict) or option in group_options(key)):
                choices.append(f"{key}={option}")
            values += _leaves(f"{key}.", value, derived) if isinstance(value, dict) else []
        elif isinstance(value, dict):
            values += _leaves(f"{key}.", value, derived)
        elif key not in derived:
            values.append(f"{key}={to_grammar(value)}")
    return expand_hub_models(choices) + values


def _leaves(prefix: str, node: dict[str, Any], derived: set[str]) -> list[str]:
    leaves = []
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if dotted in derived or (key == "name" and prefix.count(".") == 1 and prefix[:-1] in group_names()):
            continue
        if isinstance(value, dict) and dotted != "hardware.env":
            leaves += _leaves(f"{dotted}.", value, derived)
        else:
            leaves.append(f"{dotted}={to_grammar(value)}")
    return leaves


def expand_hub_models(overrides: list[str]) -> list[str]:
    """`model=org/name` is a hub model: the option `custom` with that hub id."""
    expanded = []
    for override in overrides:
        key, value = split_override(override)
        if key != "model" or "/" not in value:
            expanded.append(override)
            continue
        names = value.split(",")
        if not all("/" in name for name in names):
            listed = [name for name in names if "/" not in name]
            raise ConfigError(
                f"model={value} mixes hub ids with the shipped names {', '.join(listed)}: give the hub id of each, "
                "or run two sweeps."
            )
        expanded += ["model=custom", f"model.hub_id={value}"]
    return expanded


def last_choice_wins(overrides: list[str]) -> list[str]:
    """Keep the last choice of each group: Hydra takes one, and a file may be followed by the command line's."""
    last = {split_override(override)[0]: index for index, override in enumerate(overrides)}
    return [
        override
        for index, override in enumerate(overrides)
        if (key := split_override(override)[0]) not in group_names() or last[key] == index
    ]


def imply_groups(overrides: list[str]) -> list[str]:
    """`data.path=FILE` alone replaces the demo, `model.path=DIR` alone the tiny model."""
    keys = {split_override(override)[0] for override in overrides}
    implied = []
    if "experiment" not in keys:
        if "model" not in keys and keys & {"model.path", "model.hub_id"}:
            implied.append("model=custom")
        if "data" not in keys and keys & {"data.path", "data.hub_id"}:
            implied.append("data=jsonl")
    return implied + overrides


def suggest_key(key: str) -> str:
    """The nearest key of the schema, for a message; empty when nothing is near."""
    return did_you_mean(key, [known for known, _ in walk_schema()])
