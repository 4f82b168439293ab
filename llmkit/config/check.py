"""Check overrides one by one against the schema, before Hydra composes anything.

Hydra stops at its first problem and speaks of its own grammar; here every problem is found, and each message names the
key, the value, what is legal and the nearest known name.
"""

import dataclasses
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmkit.config.arguments import SHOW_CONFIG, SHOW_INFO, Arguments
from llmkit.config.foreign import FOREIGN_NAMES
from llmkit.config.grammar import split_override
from llmkit.config.nodes import (
    NODES,
    NODES_OF_OPTION,
    OPTIONAL_NODES,
    chosen_option,
    nodes_of_group,
    open_mappings,
    options_with,
    type_with,
    walk_schema,
)
from llmkit.config.registration import group_names, group_options
from llmkit.config.resolve import secret_problem
from llmkit.config.schema import TrainConfig
from llmkit.config.setting import is_legal, legal_values
from llmkit.config.sources import datasets_problem
from llmkit.errors import did_you_mean


def check_switches(arguments: Arguments) -> list[str]:
    """Problems of Hydra's switches, which Hydra answers with a page of usage or a traceback."""
    problems = []
    shown = arguments.switch_value(*SHOW_CONFIG)
    if shown not in (None, "job", "hydra", "all"):
        problems.append(f"--cfg {shown}: one of job, hydra, all.{did_you_mean(str(shown), ['job', 'hydra', 'all'])}")
    if arguments.multirun and arguments.has_switch(*SHOW_CONFIG, *SHOW_INFO):
        problems.append("--cfg and --info show one config: leave out -m and the values to sweep.")
    if arguments.has_switch(*SHOW_CONFIG) and arguments.has_switch(*SHOW_INFO):
        problems.append("--cfg and --info: one at a time.")
    if arguments.has_switch("--resolve") and shown is None:
        problems.append("--resolve goes with --cfg job.")
    return problems


def check_overrides(overrides: Sequence[str], *, multirun: bool, config_dir: str | None = None) -> list[str]:
    """All problems of `overrides`, each a message for the user; an empty list if Hydra may compose them.

    Args:
        config_dir: a directory of the user's own options of groups (Hydra's --config-dir).
    """
    schema = dict(walk_schema())
    problems: list[str] = []
    parsed: list[Override] = []
    parser = OverridesParser.create()
    for text in overrides:
        problem = _list_problem(text, schema, multirun=multirun)
        if not problem:
            try:
                override = parser.parse_override(text)
            except HydraException as error:
                reason = str(error).splitlines()[0]
                problem = f"{text}: cannot be read ({reason}). Special characters go in quotes: KEY=\"'VALUE'\"."
            else:
                parsed.append(override)
                problem = _problem(override, schema, multirun=multirun, config_dir=config_dir)
        if problem:
            problems.append(problem)
    return problems or _node_problems(parsed) + _interval_problems(parsed)


def _problem(
    override: Override, schema: dict[str, dataclasses.Field], *, multirun: bool, config_dir: str | None
) -> str:
    key = override.key_or_group
    if key.startswith(("hydra.", "hydra/")):
        return ""  # Hydra's own settings
    if override.is_sweep_override() and not multirun:
        more = "sweeper=random sweeper.n=20" if override.is_interval_sweep() else "-m"
        return f"{override.input_line}: several values are a sweep; add {more}."
    if key == "derived":
        return "derived: llmkit fills it in; set the keys themselves."
    if key in group_names():
        return _option_problem(key, override, config_dir)
    if key.rpartition(".")[0] in open_mappings():
        return secret_problem(key)  # here already: Hydra writes a sweep's overrides to disk
    if key in schema:
        if override.is_delete():
            return f"~{key}: keys of the schema cannot be removed; set {key}=null to unset it."
        return next((text for value in _values(override) if (text := _value_problem(key, value, schema[key]))), "")
    return unknown_key(key, "" if override.is_delete() else split_override(str(override.input_line))[1])


def _option_problem(group: str, override: Override, config_dir: str | None) -> str:
    own = sorted(path.stem for path in (Path(config_dir) / group).glob("*.yaml")) if config_dir else []
    options = (*group_options(group), *own)
    for option in _values(override):
        if isinstance(option, Glob) or option is None or option in options:
            continue
        name = str(option)
        more = " A hub model is model=org/name, a directory model.path=DIR." if group == "model" else ""
        return f"{group}={name}: unknown.{did_you_mean(name, options)} {group} is one of {', '.join(options)}.{more}"
    return ""


def unknown_key(key: str, value: str = "") -> str:
    """The message for a key the schema does not have."""
    typed = f"{key}={value}" if value else key
    last = key.rpartition(".")[2]
    node = key.split(".")[0]
    known = [name for name, _ in walk_schema()]
    if key in NODES:
        first = dataclasses.fields(NODES[key])[0].name
        return f"{typed}: '{key}' holds several keys; set each by its name, as in {key}.{first}=..."
    if (ours := FOREIGN_NAMES.get(last)) and not (ours in known and ours == key):
        return f"{typed}: llmkit has no key '{key}'; here it is {ours}."
    same_word = [name for name in known if name.rpartition(".")[2] == last]
    if same_word:
        return f"{typed}: there is no key '{key}'. Did you mean '{same_word[0]}'?"
    siblings = [name for name in known if name.startswith(f"{node}.")]
    if siblings and "." in key:
        names = ", ".join(name.partition(".")[2] for name in siblings)
        return f"{typed}: '{node}' has no key '{last}'.{did_you_mean(key, siblings)} Its keys: {names}."
    top = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "derived"]
    near = did_you_mean(key, top) or did_you_mean(key, known)
    return f"{typed}: there is no key '{key}'.{near} Top level: {', '.join(top)}."


def _values(override: Override) -> list[Any]:
    """The value of an override, or the values a sweep gives it."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_range_sweep():
        return []
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        bounds: list[Any] = [value.start, value.end]
        return [int(bound) if float(bound).is_integer() else bound for bound in bounds]
    if isinstance(value, Glob):
        return [value]
    return [_plain(item) for item in getattr(value, "list", [])]


def _plain(item: Any) -> Any:
    return getattr(item, "text", item)  # a QuotedString


def _value_problem(key: str, value: Any, field: dataclasses.Field) -> str:
    value = _plain(value)
    if key == "data.datasets":
        return datasets_problem(value)
    if isinstance(value, str) and "${" in value:
        return ""  # an interpolation; its value is checked after composing
    legal = legal_values(field)
    try:
        holder = OmegaConf.structured(type_with(key))
        OmegaConf.update(holder, key.rpartition(".")[2], value, merge=False)
    except OmegaConfBaseException:
        return f"{key}={value}: expected {type_in_words(field)}{f', {legal}' if legal else ''}."
    converted = OmegaConf.to_container(holder)[key.rpartition(".")[2]]  # type: ignore[index, call-overload]
    if not is_legal(field, converted):
        near = did_you_mean(str(value), map(str, field.metadata["choices"])) if field.metadata.get("choices") else ""
        return f"{key}={value}: must be {legal}.{near}"
    return ""


def type_in_words(field: dataclasses.Field) -> str:
    """`a whole number`, `true or false`, ... for the type of a config field."""
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Any: "any value",
    }
    kind: Any = field.type
    optional = ""
    if isinstance(kind, types.UnionType):
        kind, optional = next(arg for arg in get_args(kind) if arg is not type(None)), " or null"
    if get_origin(kind) is list:
        return f"a list, [a,b]{optional}"
    if get_origin(kind) is dict:
        return f"a mapping, {{key: value}}{optional}"
    return words.get(kind, str(kind)) + optional


def _list_problem(text: str, schema: dict[str, dataclasses.Field], *, multirun: bool) -> str:
    """`-m lora.target_modules=q_proj,v_proj` would be a sweep of two one-module jobs; ask which is meant."""
    key, value = split_override(text)
    # A list of losses is rarer than a sweep over them.
    is_list = key == "lora.target_modules" or (key == "dpo.loss_type" and not multirun)
    is_list = is_list or (key in schema and type_in_words(schema[key]).startswith("a list"))
    if not is_list or "," not in value or re.search(r"""[]['"(]""", value):
        return ""
    sweep = " or, to sweep, ".join([""] + [f"'{key}=" + ",".join(f"[{v}]" for v in value.split(",")) + "'"] * multirun)
    return f"{text}: {key} is a list. Write '{key}=[{value}]'{sweep}."


def _node_problems(overrides: list[Override]) -> list[str]:
    """`method=full lora.r=4`, `recipe=sft dpo.beta=1`: a node that the chosen option does not have."""
    if any(override.key_or_group == "experiment" for override in overrides):
        return []  # the experiment may choose the option; composing tells
    problems = []
    for group, nodes_of_option in NODES_OF_OPTION.items():
        given = [_values(override) for override in overrides if override.key_or_group == group]
        chosen = given[-1] if given else [chosen_option(TrainConfig(), group)]
        for override in overrides:
            node = override.key_or_group.split(".")[0]
            if node not in nodes_of_group(group) or "." not in override.key_or_group:
                continue
            without = [o for o in chosen if isinstance(o, str) and node not in nodes_of_option.get(o, (node,))]
            if not without:
                continue
            text = f"{override.input_line}: {group}={without[0]} has no '{node}' settings; {_owners(node)}."
            if len(chosen) > 1:
                text += f" A sweep makes every combination, so sweep {group}={without[0]} in a command of its own."
            problems.append(text)
    return problems


def _interval_problems(overrides: list[Override]) -> list[str]:
    """`training.learning_rate=interval(1e-5,1e-3)` for a sweeper that makes every combination."""
    chosen = [_values(override) for override in overrides if override.key_or_group == "sweeper"]
    elsewhere = any(override.key_or_group in ("hydra/sweeper", "experiment") for override in overrides)
    if elsewhere or (chosen and chosen[-1] == ["random"]):
        return []
    return [
        f"{override.input_line}: an interval has no end of values; draw from it with sweeper=random sweeper.n=20, or "
        "list values."
        for override in overrides
        if override.is_interval_sweep()
    ]


def missing_node(key: str) -> str:
    """The message for a key of a node that the chosen options do not have; empty for any other key."""
    node = key.split(".")[0]
    if options := options_with(key):
        owners = " or ".join(f"{node}={option}" for option in options)
        return f"{key}: the chosen {node} has no such setting; it belongs to {owners}."
    if node not in OPTIONAL_NODES:
        return ""
    (group,) = (group for group in NODES_OF_OPTION if node in nodes_of_group(group))
    return f"{key}: the chosen {group} has no '{node}' settings; {_owners(node)}."


def _owners(node: str) -> str:
    return "they belong to " + " or ".join(
        f"{group}={option}"
        for group, nodes_of_option in NODES_OF_OPTION.items()
        for option, nodes in nodes_of_option.items()
        if node in nodes
    )
