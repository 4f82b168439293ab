"""Rules for the data of a whole config: what can be told before a worker starts, without reading a row."""

from pathlib import Path

from llmkit.config.data_files import find_files, near_file
from llmkit.config.schema import DataConfig, SourceConfig, TrainConfig
from llmkit.config.sources import SPLIT, names_split, range_problems, split_source
from llmkit.errors import ConfigError
from llmkit.storage.names import storage_problems

SHARE = "a share between 0 and 1, "
HELD_OUT = "a file, the name of a split, a source {path: FILE}, or null"


def data_problems(config: TrainConfig) -> list[str]:
    """Every problem of `config.data`, each a message for the user."""
    data = config.data
    problems = _datasets_problems(data) if data.datasets else _place_problems(data, "data")
    problems += _held_out_problems(data, "validation") + _held_out_problems(data, "test")
    if isinstance(data.special_tokens, str) and not Path(data.special_tokens).is_file():
        problems.append(
            f"data.special_tokens={data.special_tokens}: no such file; a JSON file {{tokens: [...]}}, or a list "
            f"[{data.special_tokens}].{near_file(data.special_tokens)}"
        )
    if config.model.context_length and data.max_length and data.max_length > config.model.context_length:
        problems.append(
            f"data.max_length={data.max_length}: model={config.model.name} takes {config.model.context_length} at most."
        )
    return problems


def data_warnings(config: TrainConfig) -> list[str]:
    """Settings of the data that have no effect as they stand."""
    data, default = config.data, DataConfig()
    found = []
    ignored: tuple[str, ...]
    if data.datasets:
        ignored, why = ("limit", "repeat", "weight", "revision", "hub_config", "split"), "data.datasets has its own"
    elif data.path:
        # The files of conf/data bring a hub_id of their own.
        hub = ("hub_id", "hub_config") if data.name == "jsonl" else ()
        ignored, why = (*hub, "revision", "weight"), f"data.path={data.path} is read, alone"
    else:
        ignored, why = ("weight",), "it is the only source"
    for key in ignored:
        if (value := getattr(data, key)) != getattr(default, key):
            found.append(f"data.{key}={value} has no effect: {why}.")
    if config.init_from and data.chat_template not in (None, "keep-original"):
        found.append(
            f"data.chat_template={data.chat_template} takes the place of the template of init_from={config.init_from}, "
            "which it was trained with."
        )
    return found


def _place_problems(source: SourceConfig, key: str) -> list[str]:
    if not (source.path or source.hub_id):
        what = f"data={source.name}" if isinstance(source, DataConfig) else key
        return [f"{what}: say where the rows are, with {key}.path=FILE."]
    return _file_problems(source, f"{key}.path={source.path}")


def _file_problems(source: SourceConfig, said: str) -> list[str]:
    if not source.path or source.path == "demo":
        return []
    if "://" in source.path:  # what is there, the worker finds
        return [said + problem.removeprefix(source.path) for problem in storage_problems(source.path)]
    try:
        find_files(source.path, split=source.split, said=said)
    except ConfigError as error:
        return error.problems
    return []


def _datasets_problems(data: DataConfig) -> list[str]:
    problems = []
    for key in ("path", "hub_id"):
        if value := getattr(data, key):
            problems.append(
                f"data.datasets: data.{key}={value} is another source; make it one of the list, or leave it out "
                "(data=jsonl brings none)."
            )
    for index, source in enumerate(data.datasets):
        key = f"data.datasets[{index}]"
        problems += range_problems(source, key) + _place_problems(source, key)
    weightless = [f"data.datasets[{index}]" for index, source in enumerate(data.datasets) if source.weight is None]
    if 0 < len(weightless) < len(data.datasets):
        problems.append(
            f"data.datasets: {', '.join(weightless)} {'has' if len(weightless) == 1 else 'have'} no weight, others do; "
            "a weight is a share relative to the others, so give one to all or to none."
        )
    return problems


def _held_out_problems(data: DataConfig, name: str) -> list[str]:
    key, value = f"data.{name}", getattr(data, name)
    if value is None:
        return []
    if isinstance(value, int | float) and not isinstance(value, bool):
        if name == "validation" and 0 < value < 1:
            return []
        return [f"{key}={value}: {SHARE if name == 'validation' else ''}{HELD_OUT}."]
    if isinstance(value, bool | list):
        return [f"{key}={value}: {SHARE if name == 'validation' else ''}{HELD_OUT}."]
    try:
        source = split_source(data, value, key)
    except ConfigError as error:
        return error.problems
    if isinstance(value, str) and not names_split(data, value):
        problems = _file_problems(source, f"{key}={value}")
        if problems and SPLIT.fullmatch(value):
            problems[0] += " Splits have names only in a directory (data.path=DIR) or on the hub. null leaves it out."
        return problems
    return _file_problems(source, f"{key}={value}: {source.path}")
