"""The command line of the verbs that are more than a config: words of their own, and overrides of the config.

llmkit serve run=runs/alpha serve.port=8001
             own word       override
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from omegaconf import DictConfig

from llmkit.config import TrainConfig, resolve
from llmkit.config.arguments import parse_arguments
from llmkit.config.compose import run_composed
from llmkit.config.grammar import split_override
from llmkit.config.nodes import NODES, schema_keys
from llmkit.errors import ConfigError, did_you_mean
from llmkit.launchers.start import HYDRA_PLUGINS

YES_OR_NO = "true"  # the placeholder of a word that is true or false


@dataclass(kw_only=True)
class Words:
    """A command line, sorted."""

    own: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def on(self, key: str) -> bool:
        """Whether an own word that is true or false was given as true."""
        return self.own.get(key) == "true"

    def names(self, node: str) -> bool:
        """Whether an override chooses or sets something of a node."""
        return any(split_override(override)[0].split(".")[0] == node for override in self.overrides)


def sort_words(
    argv: list[str],
    *,
    verb: str,
    own: Mapping[str, str],
    nodes: Collection[str] = (),
    exclusive: Collection[Collection[str]] = (),
) -> Words:
    """Sort the words of a command line.

    Args:
        own: the verb's own keys, each with a placeholder for its value as `--help` shows it; `YES_OR_NO` for a switch.
        nodes: the nodes and groups of the config that the verb takes settings of.
        exclusive: sets of own keys and nodes of which at most one may be given.

    Raises:
        ConfigError: with all that is wrong with the words.
    """
    words, problems = Words(), []
    known = [*own, *nodes, *(key for key in schema_keys() if key.split(".")[0] in nodes)]
    for word in argv:
        key, equals, value = word.partition("=")
        if key in own:
            if not equals or not value:
                problems.append(f"{key}: needs a value: {key}={own[key]}.")
            elif own[key] == YES_OR_NO and value not in ("true", "false"):
                problems.append(f"{word}: true or false.")
            elif words.own.get(key, value) != value:
                problems.append(f"{key} is given twice: {words.own[key]} and {value}.")
            else:
                words.own[key] = value
        elif key.lstrip("+~").split(".")[0] in nodes:
            words.overrides.append(word)  # checked with all other overrides when they are composed
        else:
            taken = [f"{name}=" for name in own] + [f"{node}.*" if node in NODES else f"{node}=" for node in nodes]
            near = did_you_mean(key, known)
            problems.append(f"{word}: {verb} takes {', '.join(taken)}.{near} See llmkit {verb} --help.")
    for names in exclusive:
        given = [name for name in names if name in words.own or (name in nodes and words.names(name))]
        if len(given) > 1:
            problems.append(f"{' and '.join(given)}: one of them at a time.")
    if problems:
        raise ConfigError(*problems)
    return words


def composed(overrides: list[str]) -> TrainConfig:
    """The config that overrides make, as `llmkit train` would read them. Raises ConfigError with all that is wrong."""
    made: list[DictConfig] = []
    run_composed("train", made.append, parse_arguments(overrides), HYDRA_PLUGINS)
    return resolve(made[0])
