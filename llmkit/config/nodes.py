"""Which node and group a key of the config belongs to: look-ups in what schema.py declares."""

import functools
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import get_origin

from llmkit.config.launcher_schema import LAUNCHERS, LocalLauncherConfig
from llmkit.config.schema import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    DistributedConfig,
    DpoConfig,
    EvaluationConfig,
    FreezeConfig,
    HardwareConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    PrecisionConfig,
    QloraConfig,
    StorageConfig,
    TrackingConfig,
    TrainConfig,
    TrainingConfig,
)
from llmkit.config.serving_schema import ExportConfig, ServeConfig
from llmkit.config.sweeper_schema import SWEEPERS, EarlyStopConfig, GridSweeperConfig

# Config groups and the dataclass that types each, in the order a reader meets them.
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": MethodConfig,
    "precision": PrecisionConfig,
    "deepspeed": DeepSpeedConfig,
    "distributed": DistributedConfig,
    "hardware": HardwareConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "evaluation": EvaluationConfig,
    "early_stop": EarlyStopConfig,
    "tracking": TrackingConfig,
    "serve": ServeConfig,
    "launcher": LocalLauncherConfig,
    "sweeper": GridSweeperConfig,
}
# Nodes that exist only with some options of a group, `Any` at the root.
OPTIONAL_NODES: dict[str, type] = {"lora": LoraConfig, "qlora": QloraConfig, "freeze": FreezeConfig, "dpo": DpoConfig}
# Group -> option -> the nodes it brings beside the common ones.
NODES_OF_OPTION: dict[str, dict[str, tuple[str, ...]]] = {
    "recipe": {"sft": (), "dpo": ("dpo",)},
    "method": {"full": (), "freeze": ("freeze",), "lora": ("lora",), "qlora": ("lora", "qlora")},
}
# Groups each of whose options is typed by a dataclass of its own; the one among GROUPS is the default's.
TYPES_OF_OPTION: dict[str, dict[str, type]] = {"launcher": LAUNCHERS, "sweeper": SWEEPERS}
# Nodes without a group: no option of theirs is worth a file.
PLAIN_NODES: dict[str, type] = {"storage": StorageConfig, "export": ExportConfig}
# The dataclass of every node.
NODES: dict[str, type] = {**GROUPS, **OPTIONAL_NODES, **PLAIN_NODES}


def chosen_option(config: TrainConfig, group: str) -> str:
    """The option of a group of NODES_OF_OPTION that `config` was composed with."""
    return config.recipe if group == "recipe" else config.method.name


def nodes_of_group(group: str) -> set[str]:
    """All nodes that options of `group` bring."""
    return {node for nodes in NODES_OF_OPTION[group].values() for node in nodes}


def types_of_node(node: str) -> tuple[type, ...]:
    """The dataclasses that type a node: one, or one for each option of its group."""
    return tuple(TYPES_OF_OPTION[node].values()) if node in TYPES_OF_OPTION else (NODES[node],)


def options_with(key: str) -> list[str]:
    """The options of a group of TYPES_OF_OPTION that have a dotted key; none for a key of any other node."""
    node, _, name = key.partition(".")
    options = TYPES_OF_OPTION.get(node, {})
    return [option for option, kind in options.items() if name in {info.name for info in fields(kind)}]


def type_with(key: str) -> type:
    """The dataclass that declares a dotted key; of several options' the first."""
    node = key.rpartition(".")[0]
    if options := options_with(key):
        return TYPES_OF_OPTION[node][options[0]]
    return NODES.get(node, TrainConfig)


def walk_schema() -> Iterator[tuple[str, Field]]:
    """Every key of the schema as (dotted key, dataclass field), the nodes of all options included."""
    for info in fields(TrainConfig):
        if info.name in NODES:
            named: dict[str, Field] = {}
            for kind in types_of_node(info.name):
                named |= {inner.name: inner for inner in fields(kind) if inner.name not in named}
            yield from ((f"{info.name}.{name}", inner) for name, inner in named.items())
        else:
            yield info.name, info


@functools.cache
def schema_keys() -> frozenset[str]:
    """The dotted keys of the schema, those of all nodes included."""
    return frozenset(key for key, _ in walk_schema())


@functools.cache
def open_mappings() -> frozenset[str]:
    """The dotted keys that hold a mapping with keys of the user's own."""
    return frozenset(key for key, info in walk_schema() if get_origin(info.type) is dict)
