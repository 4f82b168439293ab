"""A user's own YAML file, or a run's config.yaml, as overrides.

They go in front of those on the command line, so that one path checks and explains both.
"""

from pathlib import Path
from typing import Any

from llmkit.config.grammar import split_override, to_grammar
from llmkit.config.nodes import NODES_OF_OPTION, OPTIONAL_NODES, nodes_of_group, schema_keys
from llmkit.config.registration import group_names
from llmkit.errors import ConfigError

# How one command was to go on; whoever repeats the run or goes on with it says so anew.
OF_ONE_COMMAND = ("resume", "resume_allow")


def file_overrides(path: Path) -> list[str]:
    """The keys of a YAML file as overrides, choices of groups first; derived keys are left out, to be derived anew.

    Raises ConfigError if the file is missing, is not YAML or is not a mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise ConfigError(f"The config file {path} does not exist.")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise ConfigError(f"{path} holds no KEY: VALUE lines; write for example `model: mistral7b`.")
    content: dict[str, Any] = {str(key): value for key, value in loaded.items()}
    if "derived" in content:  # a run's own config.yaml
        content = {key: value for key, value in content.items() if key not in OF_ONE_COMMAND}
    derived = set(content.pop("derived", None) or [])
    choices, values = [], []
    for key, value in content.items():
        if value is None and (key in group_names() or key in OPTIONAL_NODES):
            continue
        if key in group_names():
            option = value.get("name") if isinstance(value, dict) else value
            if isinstance(option, bool):  # YAML reads a bare `off` as false
                option = "on" if option else "off"
            if option is not None and f"{key}.name" not in derived:
                choices.append(f"{key}={option}")
        if isinstance(value, dict):
            values += _leaves(f"{key}.", value, derived)
        elif key not in group_names():
            values.append(f"{key}={to_grammar(value)}")
    return choices + values


def _leaves(prefix: str, node: dict[str, Any], derived: set[str]) -> list[str]:
    leaves = []
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if dotted in derived or (key == "name" and prefix[:-1] in group_names()):
            continue
        if isinstance(value, dict) and dotted not in schema_keys():
            leaves += _leaves(f"{dotted}.", value, derived)
        else:
            leaves.append(f"{dotted}={to_grammar(value)}")
    return leaves


def give_way(overrides: list[str], later: list[str]) -> list[str]:
    """`overrides` without what choices of groups among the `later` ones replace as a whole.

    `model=phi2` on the command line takes the place of all a file says of its model, `method=full` of its `lora`,
    `recipe=sft` of its `dpo`.
    """
    chosen = {key: value for key, value in map(split_override, later) if key in group_names()}
    replaced = set(chosen)
    for group in NODES_OF_OPTION.keys() & chosen.keys():
        options, nodes = chosen[group].split(","), nodes_of_group(group)
        replaced |= nodes - {node for option in options for node in NODES_OF_OPTION[group].get(option, nodes)}
    # Another data set or revision is not at the commit of the old one.
    asked = {split_override(override)[0] for override in later}
    stale = {f"{node}.commit" for node in ("model", "data") if asked & {f"{node}.hub_id", f"{node}.revision"}}
    keys = [split_override(override)[0] for override in overrides]
    return [o for o, key in zip(overrides, keys, strict=True) if key.split(".")[0] not in replaced and key not in stale]
