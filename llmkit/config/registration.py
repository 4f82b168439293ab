"""Make the typed schema known to Hydra, under the names that `conf/` refers to."""

import functools
from importlib import resources

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from llmkit.config.nodes import GROUPS, OPTIONAL_NODES, TYPES_OF_OPTION
from llmkit.config.schema import TrainConfig
from llmkit.rundir import default_run_dir


@functools.cache
def register() -> None:
    """Register the schema nodes and the one resolver `conf/` uses; once per process."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for name, node in OPTIONAL_NODES.items():
        store.store(group="schema", name=name, node=node)
    for group, options in TYPES_OF_OPTION.items():
        for name, node in options.items():
            store.store(group=f"schema/{group}", name=name, node=node)
    # Cached: a sweep's directory must not move when the clock ticks between two readings.
    OmegaConf.register_new_resolver(
        "llmkit_run_dir", lambda run_dir, name: run_dir or default_run_dir(name), use_cache=True, replace=True
    )


@functools.cache
def group_options(group: str) -> tuple[str, ...]:
    """The options of a config group: the names of its files, sorted. Empty if there is no such group."""
    folder = resources.files("llmkit.conf") / group
    if not folder.is_dir():
        return ()
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")))


@functools.cache
def group_names() -> tuple[str, ...]:
    """All groups a user can pick from; `recipe` and `experiment` have no node of their own."""
    return ("recipe", *GROUPS, "experiment")


def groups_of_experiment(option: str) -> set[str]:
    """The groups that an experiment file chooses itself; all, if it is not one of ours."""
    if not option or option == "null":
        return set()
    if option not in group_options("experiment"):
        return set(group_names())
    text = (resources.files("llmkit.conf") / "experiment" / f"{option}.yaml").read_text(encoding="utf-8")
    defaults = OmegaConf.to_container(OmegaConf.create(text)).get("defaults", [])  # type: ignore[union-attr]
    return {str(key).removeprefix("override /") for entry in defaults if isinstance(entry, dict) for key in entry}
