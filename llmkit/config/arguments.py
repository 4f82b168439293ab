"""From what a user types to what Hydra's grammar reads."""

import functools
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llmkit.config.grammar import split_override, to_grammar
from llmkit.config.init_from import implied_model
from llmkit.config.nodes import open_mappings, walk_schema
from llmkit.config.registration import groups_of_experiment
from llmkit.config.schema import StorageConfig
from llmkit.config.user_file import file_overrides, give_way
from llmkit.errors import ConfigError, did_you_mean
from llmkit.remote import reach_with

MULTIRUN = ("-m", "--multirun")
# Hydra's other switches, those that take a value first.
SHOW_CONFIG = ("--cfg", "-c")
CONFIG_DIR = ("--config-dir", "-cd")
SWITCHES_WITH_VALUE = (*SHOW_CONFIG, "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", *CONFIG_DIR)
SHELL_COMPLETION = ("--shell-completion", "-sc")
SHOW_INFO = ("--info", "-i")
SWITCHES = ("--help", "-h", "--hydra-help", "--version", "--resolve", *SHOW_INFO, *SHELL_COMPLETION)
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # what may follow --info

HYDRAS_WORDS = {  # other words for a choice of ours, which chooses Hydra's side too
    "hydra/launcher=": "launcher=",
    "hydra/sweeper=random": "sweeper=random",
    "hydra/sweeper=grid": "sweeper=grid",
}
SWEEPER = "sweeper="  # asks for a sweep, as -m does

# A value whose user has quoted or bracketed it already, and one that Hydra's sweeper makes several of.
TEXT_LIST = re.compile(r"""\[([^]['"]*)\]""")
QUOTED_VALUE = re.compile(r"""'.*'|".*"|\[.*\]|\{.*\}""")
SWEEP_VALUE = re.compile(r"(choice|glob|range|shuffle|sort|interval|tag)\(")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass
class Arguments:
    """The command line, sorted: Hydra's switches and the overrides, ready for Hydra."""

    switches: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    multirun: bool = False

    def to_argv(self) -> list[str]:
        """-m goes first: Hydra 1.3 parses its positionals in one piece (hydra#2488)."""
        return [*(["--multirun"] if self.multirun else []), *self.switches, *self.overrides]

    def has_switch(self, *names: str) -> bool:
        """Whether one of the switches was given."""
        return not set(names).isdisjoint(self.switches)

    def switch_value(self, *names: str) -> str | None:
        """The word after a switch; None if it was not given."""
        return next((value for word, value in itertools.pairwise(self.switches) if word in names), None)

    @property
    def completes_shell(self) -> bool:
        """Whether the shell asks for completions; the overrides are then Hydra's (`query=bash`), not keys."""
        return self.has_switch(*SHELL_COMPLETION)


def parse_arguments(argv: list[str]) -> Arguments:
    """Sort switches from overrides, read config files, and make every value one that Hydra's grammar takes.

    Raises ConfigError for a missing or broken file and for words that are neither.
    """
    arguments, words = _sort(argv)
    if arguments.completes_shell:
        arguments.overrides = words
        return arguments
    layers = []
    words = [_in_our_words(word) for word in words]
    if any(word.startswith(SWEEPER) for word in words) and not arguments.has_switch(*SHOW_CONFIG, *SHOW_INFO):
        arguments.multirun = True
    while words and _is_config_file(words[0]):
        layers.append(expand_hub_models(file_overrides(Path(words.pop(0)))))
    if strangers := [word for word in words if "=" not in word and not word.startswith("~")]:
        raise ConfigError(
            *(
                f"'{word}' is not an override: write data.path={word}."
                if Path(word).is_file() and not word.endswith((".yaml", ".yml"))
                else f"'{word}' is not an override: write KEY=VALUE, for example model=mistral7b or lora.r=16. "
                "A config file (.yaml) comes first."
                for word in strangers
            )
        )
    layers.append(expand_hub_models([quote_text(word, multirun=arguments.multirun) for word in words]))
    for layer in layers:
        arguments.overrides = give_way(arguments.overrides, layer) + layer
    arguments.overrides = [_open_mapping(override) for override in imply_groups(arguments.overrides)]
    return arguments


def _in_our_words(word: str) -> str:
    for theirs, ours in HYDRAS_WORDS.items():
        if word.startswith(theirs):
            return ours + word.removeprefix(theirs)
    return word


def completion_line(line: str) -> str:
    """The command line that a shell wants completed, with the words before the last as Hydra's grammar reads them."""
    command, *words = line.split()
    last = words.pop() if words and not line.endswith(" ") else ""
    try:
        before = parse_arguments(words).to_argv()
    except ConfigError:
        before = []
    return " ".join([command, *(word for word in before if " " not in word), last])


def _sort(argv: list[str]) -> tuple[Arguments, list[str]]:
    arguments, typed = Arguments(), []
    words: Iterator[str] = itertools.chain.from_iterable(
        word.split("=", 1) if word.startswith("--") else [word] for word in argv
    )  # `--cfg=job` is `--cfg job`
    for word in words:
        if word in MULTIRUN:
            arguments.multirun = True
        elif word in SWITCHES_WITH_VALUE:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{word}: a value must follow it.")
            arguments.switches += [word, value]
        elif word in SWITCHES or (word in INFO and arguments.switches and arguments.switches[-1] in SHOW_INFO):
            arguments.switches.append(word)
        elif word.startswith("-"):
            known = (*MULTIRUN, *SWITCHES_WITH_VALUE, *SWITCHES)
            raise ConfigError(
                f"{word}: unknown switch.{did_you_mean(word, known)} Settings are KEY=VALUE, no dashes; see --help."
            )
        else:
            typed.append(word)
    return arguments, typed


def _is_config_file(word: str) -> bool:
    """A run of a sweep lies in a directory like `r=4_lora_alpha=8`, so `=` alone does not make an override."""
    return word.endswith((".yaml", ".yml")) and ("=" not in word or os.path.isfile(word))


@functools.cache
def text_keys() -> frozenset[str]:
    """The dotted keys that hold free text (paths, URLs, names), and `KEY.*` for mappings to such texts."""
    return frozenset(
        f"{key}.*" if info.type == dict[str, str] else key
        for key, info in walk_schema()
        if info.metadata.get("text")
        or (info.type in (str, str | None, dict[str, str]) and not info.metadata.get("choices"))
    )


def quote_text(override: str, *, multirun: bool) -> str:
    """Quote the value of a key that holds text, so that `=`, commas, spaces and brackets reach it as typed.

    In a sweep a comma separates values, unless the whole is the name of something that exists.
    """
    key, value = split_override(override)
    is_text = {key, f"{key.rpartition('.')[0]}.*"} & text_keys()
    if is_text and (texts := TEXT_LIST.fullmatch(value)):  # [<|a|>,<|b|>]
        return override.removesuffix(value) + to_grammar([text.strip() for text in texts[1].split(",") if text.strip()])
    if not is_text or value in ("", "null") or QUOTED_VALUE.fullmatch(value):
        return override
    if multirun and SWEEP_VALUE.match(value):
        return override
    items = value.split(",") if multirun and not os.path.exists(value) else [value]
    return override.removesuffix(value) + ",".join(_as_typed(key, item) for item in items)


def _as_typed(key: str, value: str) -> str:
    if value == "null" or (key == "data.validation" and NUMBER.fullmatch(value)):
        return value
    # Shells expand a ~ at the start of a word only.
    return to_grammar(os.path.expanduser(value) if value.startswith("~/") else value)


def expand_hub_models(overrides: list[str]) -> list[str]:
    """`model=org/name` is a hub model: the option `custom` with that hub id. Raises ConfigError for a directory."""
    expanded = []
    for override in overrides:
        key, value = split_override(override)
        if key != "model" or "/" not in value:
            expanded.append(override)
            continue
        names = value.split(",")
        for name in names:
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                raise ConfigError(f"model={name}: a hub model is org/name; a directory is model.path={name}.")
        if listed := [name for name in names if "/" not in name]:
            raise ConfigError(
                f"model={value} mixes hub ids with the shipped names {', '.join(listed)}: give the hub id of each, "
                "or run two sweeps."
            )
        expanded += ["model=custom", f"model.hub_id={value}"]
    return expanded


def _open_mapping(override: str) -> str:
    """A mapping like `hardware.env` takes any key, which in Hydra's grammar is `++`."""
    key, _ = split_override(override)
    is_open = key in open_mappings() or key.rpartition(".")[0] in open_mappings()
    return f"++{override}" if is_open and not override.startswith(("+", "~")) else override


def _model_of_start(values: dict[str, str]) -> str | None:
    """See `implied_model`; a bucket is reached as the overrides say."""
    if "s3://" in values.get("init_from", ""):
        reach_with(_storage(values))
    return implied_model(values.get("init_from", ""))


def storage_of(words: list[str]) -> StorageConfig:
    """The settings of buckets among the words of a command line, before it is composed."""
    return _storage(dict(split_override(word) for word in words if "=" in word))


def _storage(values: dict[str, str]) -> StorageConfig:
    """The settings of buckets among overrides in Hydra's grammar; wrong ones are explained when all are checked."""
    words = [f"{key.removeprefix('storage.')}={value}" for key, value in values.items() if key.startswith("storage.")]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StorageConfig), OmegaConf.from_dotlist(words))
        return cast(StorageConfig, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, YAMLError):
        return StorageConfig()


def imply_groups(overrides: list[str]) -> list[str]:
    """`data.path=FILE` or `data.datasets=[...]` alone replaces the demo, `model.path=DIR` or `init_from=DIR` tiny."""
    values = dict(map(split_override, overrides))
    chosen = values.keys() | groups_of_experiment(values.get("experiment", ""))
    implied = []
    if "model" not in chosen and values.keys() & {"model.path", "model.hub_id"}:
        implied.append("model=custom")
    elif "model" not in chosen and (started := _model_of_start(values)):
        implied.append(f"model={started}")
    if "data" not in chosen and values.keys() & {"data.path", "data.hub_id", "data.datasets"}:
        implied.append("data=jsonl")
    return implied + overrides
