"""Before anything is queued on a cluster: is the model there, would training start at this data, can it be served?

Each model and each data set of a sweep is looked at once. What is prepared here is kept in llmkit's cache.
"""

import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkit.config import TrainConfig
from llmkit.data.progress import now_and_then
from llmkit.errors import ConfigError
from llmkit.launchers.light_imports import light_imports

SECONDS_PER_LINE = 5.0  # between two lines of progress


def preflight(configs: Sequence[TrainConfig]) -> None:
    """Look at the model, the data and the way to serving of each run. Raises ConfigError with all that is wrong."""
    problems: list[str] = []
    for config in _distinct(configs, "serve", "lora"):
        problems += _serving_problems(config)
    if problems:  # of the config alone, which take no time to find
        raise ConfigError(*problems)
    with light_imports(configs[0]):
        from llmkit.data.preview import report  # noqa: F401 - imported here, where it is light
    for config in _distinct(configs, "model"):
        problems += _problems(_check_model, config)
    if not problems:
        for config in _distinct(configs, "model", "data", "recipe"):
            problems += _problems(_check_data, config)
    if problems:
        raise ConfigError(*problems, "Nothing was queued. launcher.preflight=false leaves these checks to the nodes.")


def _distinct(configs: Sequence[TrainConfig], *nodes: str) -> Iterator[TrainConfig]:
    """One of all the configs that agree in these nodes, a copy: looking completes a config."""
    return map(copy.deepcopy, {repr([getattr(config, node) for node in nodes]): config for config in configs}.values())


def _problems(check: Any, config: TrainConfig) -> list[str]:
    try:
        check(config)
    except ConfigError as error:
        return error.problems
    return []


def _check_model(config: TrainConfig) -> None:
    """Raise ConfigError where the model's config, tokenizer or weights cannot be had."""
    from llmkit.model.context import settle_lengths
    from llmkit.model.files import model_files
    from llmkit.model.hub import look_up
    from llmkit.model.tokenizer import load_original_tokenizer

    model = config.model
    settle_lengths(config)
    load_original_tokenizer(model)
    try:
        if model.path and "://" not in model.path:  # of a bucket's, the files were looked at when it was opened
            model_files(path.name for path in Path(model.path).iterdir())
        elif model.hub_id and not model.path:
            model_files(look_up(model).files)
    except ConfigError as error:
        source = model.path or model.hub_id
        raise ConfigError(
            *(p if str(source) in p else f"model={model.name}: {source} {p}" for p in error.problems)
        ) from error


def _check_data(config: TrainConfig) -> None:
    """Raise ConfigError for data that training would stop at; what deserves a look is a warning."""
    from llmkit.data.preview import report

    found = report.look(config, report.run_inputs(config), progress=now_and_then(_say, seconds=SECONDS_PER_LINE))
    if found.audit["problems"]:
        raise ConfigError(*found.audit["problems"])
    for warning in found.audit["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    train = found.audit["splits"]["train"]
    name = report.data_name(config.data) or config.data.name
    print(f"checked {name} for {config.model.name}: {train['used']:,} rows, {train['tokens']:,} tokens", flush=True)


def _serving_problems(config: TrainConfig) -> list[str]:
    """What keeps vLLM from serving the result as `serve` says."""
    from llmkit.serving.servable import unservable, warning_at_training

    if config.lora is None:
        return []
    adapter = dataclasses.asdict(config.lora)
    obstacle = unservable(adapter)
    if obstacle and config.serve.adapter == "unmerged":
        return [f"serve.adapter=unmerged: vLLM does not serve {obstacle} beside a base; leave serve.adapter out."]
    if obstacle:
        print(f"warning: {warning_at_training(adapter)}", file=sys.stderr)
    return []


def _say(line: str) -> None:
    print(f"preparing {line}", file=sys.stderr, flush=True)
