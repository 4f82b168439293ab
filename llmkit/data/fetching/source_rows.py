"""The rows of a data set of the hub, of files or of the demo, as a fetch writes them: under the names of a format."""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

from llmkit.config.data_files import splits_of
from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.fetching.destination import Origin
from llmkit.data.reading.hub import HubSource
from llmkit.data.reading.remote_files import splits_at
from llmkit.data.reading.sources import DEMO_SPLITS, open_source
from llmkit.remote import is_remote


class SourceRows:
    """What `data` names, all of its splits or one; nothing is asked of the hub until `open`."""

    def __init__(self, data: DataConfig, *, split: str | None):
        names = ("path", "hub_id", "hub_config", "revision", "commit")
        self._config = SourceConfig(**{name: getattr(data, name) for name in names}, split=split or data.split)
        self._columns = data.columns
        self.layout = data.format
        self.splits: tuple[str, ...] = (split,) if split else ()
        self.tokens: tuple[str, ...] = ()
        self._one = split

    @property
    def origin(self) -> Origin:
        """Where the rows come from; with the commit once they have been opened."""
        config = self._config
        if config.path:
            # Of a path on this machine the last part says enough.
            path = config.path if is_remote(config.path) else Path(config.path).name
            return Origin({"source": {"path": path, "split": self._one}})
        source = {"hub_id": config.hub_id, "hub_config": config.hub_config, "split": self._one}
        return Origin({"source": source, "revision": config.revision, "commit": config.commit})

    def open(self) -> None:
        """Find out the splits and the special tokens. Raises ConfigError for a source that cannot be had."""
        if not self.splits:
            self.splits = tuple(self._splits())
        found = [token for split in self.splits for token in self._source(split).special_tokens]
        self.tokens = tuple(dict.fromkeys(found))

    def place(self, split: str) -> str:
        """How messages name a split's rows."""
        return f"{self._config.path or self._config.hub_id}, split '{split}'"

    def rows(self, split: str) -> Generator[Any, None, None]:
        """The rows of the split, their columns renamed as `data.columns` asks for."""
        theirs = {name: ours for ours, name in self._columns.items()}
        for block in self._source(split).blocks():
            for row in block.rows():
                yield {theirs.get(name, name): value for name, value in row.values.items()} if theirs else row.values

    def _splits(self) -> list[str]:
        path = self._config.path
        if path is None:
            return _HubSplits(self._config, key="data").names()
        if path == "demo":
            return list(DEMO_SPLITS)
        if is_remote(path):
            return splits_of(splits_at(path))
        return splits_of(file.name for file in Path(path).iterdir()) if Path(path).is_dir() else ["train"]

    def _source(self, split: str) -> Any:
        source = dataclasses.replace(self._config, split=split)
        opened = open_source(source)
        self._config.commit = source.commit  # all splits are of one
        return opened


class _HubSplits(HubSource):
    """A data set of the hub, of which it is not known what splits it has."""

    def names(self) -> list[str]:
        """The splits. Raises ConfigError if the data set cannot be had."""
        with self._explained(self._commit):
            builder = self._builder(self._commit)
            builder.download_and_prepare()
        return list(builder.info.splits)
