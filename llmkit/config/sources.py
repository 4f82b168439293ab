"""Sources as a config writes them: the entries of `data.datasets`, and what `data.validation` and `data.test` mean."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmkit.config.data_files import file_type
from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.config.setting import is_legal, legal_values
from llmkit.errors import ConfigError, did_you_mean
from llmkit.remote import is_remote

# The name of a split, or what the Datasets library makes of several and parts of them: train[:10%]+test.
SPLIT = re.compile(r"\w+(\[[^\]]*\])?(\+\w+(\[[^\]]*\])?)*")
FIELDS = {field.name: field for field in dataclasses.fields(SourceConfig)}
# Of training rows only.
MIXING = ("weight", "repeat")


def split_source(data: DataConfig, value: Any, key: str) -> SourceConfig:
    """The source that `value` of `data.validation` or `data.test` stands for; it need not exist.

    A file, directory or glob has the format and the columns of the data. A word is the name of a split, where the data
    has any (a directory or a data set of the hub has); a directory of that name is then `./word`. A mapping is a source
    of its own, or the data itself with another split, format or limit.

    Args:
        key: the config's name for `value`, for messages.

    Raises:
        ConfigError: lists every problem of a mapping; or `value` is none of these.
    """
    if isinstance(value, Mapping):
        return _source_of_mapping(data, value, key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}={value}: a file, the name of a split, a source {{path: FILE}}, or null.")
    if value == "demo":
        return SourceConfig(path="demo", split="validation")
    if names_split(data, value):
        return _other_rows_of(data, split=value)
    return SourceConfig(path=value, format=data.format, columns=dict(data.columns))


def names_split(data: DataConfig, value: str) -> bool:
    """Whether `value` is the name of a split of the data, and not a path."""
    if data.datasets or value == "demo" or not SPLIT.fullmatch(value):
        return False
    return data.path == "demo" or (_is_directory(data.path) if data.path else data.hub_id is not None)


def _is_directory(path: str) -> bool:
    """Whether files named after splits may lie there; of a bucket the address alone has to tell."""
    return file_type(PurePath(path)) is None if is_remote(path) else Path(path).is_dir()


def range_problems(source: SourceConfig, key: str) -> list[str]:
    """Values of `source` out of the range that the schema declares for them."""
    problems = []
    for name, field in FIELDS.items():
        value = getattr(source, name)
        if not is_legal(field, value):
            near = did_you_mean(str(value), map(str, field.metadata["choices"])) if field.metadata["choices"] else ""
            problems.append(f"{key}.{name}={value}: must be {legal_values(field)}.{near}")
    return problems


def datasets_problem(value: Any) -> str:
    """What is wrong with the form of a list of sources; an empty string if nothing is."""
    example = "[{path: FILE}, {hub_id: org/name, limit: 1000}]"
    if not isinstance(value, list):
        return f"data.datasets={value}: expected a list of sources, {example}."
    for index, entry in enumerate(value):
        key = f"data.datasets[{index}]"
        if not isinstance(entry, Mapping):
            return f"{key}={entry}: a source is a mapping; expected {example}."
        try:
            _typed_source(entry, key, legal=list(FIELDS))
        except ConfigError as error:
            return error.problems[0]
    return ""


def _other_rows_of(data: DataConfig, **changes: Any) -> SourceConfig:
    """The data's own place and layout; how much of it is trained on, and how often, is not part of that."""
    return SourceConfig(
        **{name: getattr(data, name) for name in FIELDS if name not in ("limit", *MIXING, *changes)}, **changes
    )


def _source_of_mapping(data: DataConfig, value: Mapping[Any, Any], key: str) -> SourceConfig:
    own_place = value.get("path") or value.get("hub_id")
    if not own_place and data.datasets:
        raise ConfigError(f"{key}: say where the rows are, with path or hub_id: data.datasets has several sources.")
    # Another revision is not at the commit that was found for the training rows.
    changes: dict[str, Any] = {"commit": None} if "revision" in value else {}
    base = SourceConfig() if own_place else _other_rows_of(data, **changes)
    source = _typed_source(value, key, base=base, legal=[name for name in FIELDS if name not in MIXING])
    if problems := range_problems(source, key):
        raise ConfigError(*problems)
    return source


def _typed_source(value: Mapping[Any, Any], key: str, *, base: Any = SourceConfig, legal: list[str]) -> SourceConfig:
    problems = [
        f"{key}.{name}: only training rows have it."
        if name in FIELDS
        else f"{key}: a source has no key '{name}'.{did_you_mean(str(name), legal)} Its keys: {', '.join(legal)}."
        for name in value
        if name not in legal
    ]
    if problems:
        raise ConfigError(*problems)
    try:
        source: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), dict(value)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}") from error
    return source
