"""Run a verb's task on the config that Hydra composes from `conf/` and the command line."""

import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from llmkit.config.arguments import CONFIG_DIR, Arguments, completion_line
from llmkit.config.check import check_overrides, check_switches, missing_node, unknown_key
from llmkit.config.registration import group_names, group_options, register
from llmkit.errors import ConfigError


def run_composed(
    config_name: str,
    task: Callable[[DictConfig], Any],
    arguments: Arguments,
    plugins: dict[str, type],
) -> None:
    """Compose `conf/<config_name>.yaml` with the arguments and call `task` (a sweep: the chosen launcher) on it.

    Args:
        plugins: Hydra launchers and sweepers by name, made known under the namespace that Hydra accepts.

    Raises:
        ConfigError: lists every problem of the overrides.
    """
    register()
    _register_plugins(plugins)
    if not arguments.completes_shell:
        own_options = arguments.switch_value(*CONFIG_DIR)
        problems = check_switches(arguments)
        problems += check_overrides(arguments.overrides, multirun=arguments.multirun, config_dir=own_options)
        if problems:
            raise ConfigError(*problems)
    elif "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = completion_line(os.environ["COMP_LINE"])
    entry = hydra.main(version_base="1.3", config_path="pkg://llmkit.conf", config_name=config_name)(task)
    with _hydra_environment([sys.argv[0], *arguments.to_argv()]):
        try:
            entry()
        except (HydraException, OmegaConfBaseException) as error:
            if not arguments.completes_shell:  # an unfinished line has nothing to complete, and no message either
                raise ConfigError(_explain(error)) from error
        except ValueError as error:
            if not arguments.completes_shell:
                raise
            raise ConfigError(str(error)) from error


@contextmanager
def _hydra_environment(argv: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and hands exceptions on (instead of printing them and exiting 1) with HYDRA_FULL_ERROR."""
    saved_argv, saved_switch = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if saved_switch is not None:
            os.environ["HYDRA_FULL_ERROR"] = saved_switch


def _register_plugins(plugins: dict[str, type]) -> None:
    """Give launchers and sweepers a home in `hydra_plugins`, the one namespace Hydra instantiates plugins from.

    A real namespace package would be imported at the start of every Hydra program on the machine.
    """
    from hydra.core.plugins import Plugins

    try:
        import hydra_plugins  # noqa: F401
    except ImportError:  # no package here brings the namespace
        namespace = types.ModuleType("hydra_plugins")
        namespace.__path__ = []
        sys.modules["hydra_plugins"] = namespace
    module = types.ModuleType("hydra_plugins.llmkit_launchers")
    for name, plugin in plugins.items():
        setattr(module, name, plugin)
        plugin.__module__ = module.__name__
        Plugins.instance().register(plugin)
    sys.modules[module.__name__] = module


def groups_in_words() -> str:
    """The groups and their options, for `--help`."""
    return "\n".join(f"  {group:<12}{', '.join(group_options(group))}" for group in group_names())


def _explain(error: Exception) -> str:
    """What the checks of single overrides could not see, in Hydra's and OmegaConf's words where we have no better."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = str(getattr(cause, "full_key", None) or "")
    text = str(cause).splitlines()[0]
    if key.startswith("hydra.") or not key:
        text = " ".join(str(error).split("\nConfig search path")[0].split())
        return f"{key}: {text}" if key else text
    return missing_node(key) or (unknown_key(key) if "not in" in text else f"{key}: {text}")
