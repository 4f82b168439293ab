"""Rows of the hub's data sets, at one commit: prepared by the Datasets library, which keeps them as Arrow on disk."""

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmkit.config.schema import SourceConfig
from llmkit.data.reading.blocks import BLOCK_BYTES, BLOCK_ROWS, Block, Records
from llmkit.errors import ConfigError, did_you_mean

COMMIT = re.compile(r"[0-9a-f]{40}")
CARD = "README.md"
OUT_OF_REACH = (
    "With a network: check HF_ENDPOINT and HF_HUB_OFFLINE, and HF_TOKEN if it is gated or private. Without: copy it "
    "here and use data.path=DIR."
)


class HubSource:
    """The rows of one split of a data set of the hub, in order.

    To open one finds the commit of the revision and writes it to `config.commit`, so that whoever reads the config
    again reads the same rows. Raises ConfigError if there is no such data set, or it cannot be reached.
    """

    def __init__(self, config: SourceConfig, *, key: str):
        self.name = str(config.hub_id)
        self.special_tokens: list[str] = []
        self.parts = [self.name]
        self._said = f"{key}.hub_id={config.hub_id}"
        self._hub_config, self._split, self._limit = config.hub_config, config.split, config.limit
        self._commit = config.commit = config.commit or self._find_commit(config.revision)

    def fingerprint(self) -> str:
        """A hash of what names the rows: data set, configuration, split and commit."""
        named = json.dumps([self.name, self._hub_config, self._split, self._commit])
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()

    def blocks(self) -> Iterator[Block]:
        """The rows, `limit` applied, in pieces that take a few MB. Raises ConfigError if they cannot be had."""
        with self._explained(self._commit):
            table = self._load()
        end = len(table) if self._limit is None else min(self._limit, len(table))
        at_once = max(1, min(BLOCK_ROWS, BLOCK_BYTES * len(table) // max(table.data.nbytes, 1)))
        for first in range(0, end, at_once):
            columns: dict[str, list[Any]] = table[first : min(first + at_once, end)]
            rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
            yield Records(self.name, first, rows)

    def _load(self) -> Any:
        builder = self._builder(self._commit)
        if builder.hash != self._commit:  # the library takes what it has, whatever was asked for
            raise ConfigError(
                f"{self._said}: the hub cannot be reached, and the cache holds commit {builder.hash}, not "
                f"{self._commit}. {OUT_OF_REACH}"
            )
        builder.download_and_prepare()
        known = list(builder.info.splits or {})
        word = re.split(r"\W", self._split)[0]
        if known and word not in known:
            names = ", ".join(known)
            raise ConfigError(f"{self._said}: has no split '{word}', but {names}.{did_you_mean(word, known)}")
        return builder.as_dataset(split=self._split)

    def _builder(self, revision: str | None) -> Any:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        # Under its full name: a directory with the name of the data set would come first.
        with _quiet("datasets"):
            return datasets.load_dataset_builder(f"hf://datasets/{self.name}", self._hub_config, revision=revision)

    def _find_commit(self, revision: str) -> str:
        """The commit of `revision`, asked of the hub, or of its cache where the hub cannot be reached."""
        import huggingface_hub
        from huggingface_hub import constants, errors, file_download

        if COMMIT.fullmatch(revision):
            return revision
        with self._explained(revision):
            try:
                # Whether there is such a file or not, its commit stays in the hub's cache.
                card = huggingface_hub.hf_hub_download(self.name, CARD, repo_type="dataset", revision=revision)
                return Path(card).parent.name
            except errors.RemoteEntryNotFoundError:
                return str(huggingface_hub.HfApi().dataset_info(self.name, revision=revision).sha)
            except errors.LocalEntryNotFoundError:
                folder = file_download.repo_folder_name(repo_id=self.name, repo_type="dataset")
                with suppress(OSError):
                    return (Path(constants.HF_HUB_CACHE) / folder / "refs" / revision).read_text().strip()
                if revision == "main":  # another program may have prepared it
                    return str(self._builder(None).hash)
                raise

    @contextmanager
    def _explained(self, revision: str) -> Iterator[None]:
        """Turn the libraries' errors about a data set that cannot be had into one message."""
        import httpx2
        from datasets.exceptions import DatasetsError

        try:
            yield
        except (OSError, ValueError, RuntimeError, httpx2.HTTPError, DatasetsError) as error:
            raise ConfigError(self._explanation(error, revision)) from error

    def _explanation(self, error: Exception, revision: str) -> str:
        from huggingface_hub import errors

        causes = list(_chain(error))

        def caused_by(*kinds: type[Exception]) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)

        if caused_by(errors.RevisionNotFoundError):
            return f"{self._said}: has no revision '{revision}'."
        if caused_by(errors.GatedRepoError):
            return (
                f"{self._said}: is gated; accept its licence at its page on the hub, then set HF_TOKEN (or run "
                "`hf auth login`)."
            )
        if caused_by(errors.RepositoryNotFoundError):
            return f"{self._said}: no such data set on the hub, or a private one (then set HF_TOKEN)."
        lines = [line.strip().rstrip(".") + "." for line in str(error).strip().splitlines()] or [type(error).__name__]
        if isinstance(error, ValueError) and "onfig" in lines[0]:  # the second line names those there are
            return f"{self._said}: {' '.join(lines[:2])} Choose one with hub_config."
        return f"{self._said} cannot be loaded: {lines[0]} {OUT_OF_REACH}"


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep a library's warnings off the terminal: what they tell is checked here."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
