"""The splits in tokens, before any row is refused or dropped: what the audit looks at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.encoding.batches import read_example, write_example
from llmkit.data.encoding.cache import EncodedSource, EncodingOptions, encode_source
from llmkit.data.examples import Example
from llmkit.data.reading.sources import (
    Source,
    listed_tokens,
    open_source,
    open_training_sources,
    split_source,
    training_sources,
)
from llmkit.data.rows import EXCERPT
from llmkit.errors import DataError
from llmkit.model.special_tokens import read_special_tokens


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The examples of one split before any is refused or dropped: those at `chosen` of all sources put together."""

    name: str  # train, validation or test
    sources: list[EncodedSource]
    chosen: np.ndarray
    max_length: int

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.column("length")

    @cached_property
    def learnt(self) -> np.ndarray:
        return self.column("learnt")

    @cached_property
    def origins(self) -> np.ndarray:
        """The number of the row that each came from: the parts of a row that was split share it."""
        return origins(self.sources)[self.chosen]

    @property
    def overlong(self) -> np.ndarray:
        return self.lengths > self.max_length

    @property
    def empty(self) -> np.ndarray:
        return (self.learnt == 0) & ~self.overlong

    def column(self, name: str) -> np.ndarray:
        """A column of numbers (see EncodedSource) of the chosen examples."""
        return np.concatenate([source.column(name) for source in self.sources])[self.chosen]

    def place(self, index: int) -> str:
        """`FILE, row N` of the chosen example `index`."""
        source, inner = self._find(index)
        return source.place(inner)

    def encoded(self, index: int) -> dict[str, Any]:
        """The columns of the chosen example `index`: its tokens and its facts."""
        source, inner = self._find(index)
        return source.examples[inner]

    def example(self, index: int) -> Example:
        """The chosen example `index` in its internal form."""
        return read_example(self.encoded(index)["example"])

    def _find(self, index: int) -> tuple[EncodedSource, int]:
        position = int(self.chosen[index])
        for source in self.sources:
            if position < len(source):
                return source, position
            position -= len(source)
        raise IndexError(index)

    def __len__(self) -> int:
        return len(self.chosen)


def origins(sources: list[EncodedSource]) -> np.ndarray:
    """For every example of all sources put together the number of the row it came from."""
    return np.cumsum(np.concatenate([source.begins_row for source in sources])) - 1


def draft_splits(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    preference: bool,
    opened: list[Source] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Draft]:
    """The splits in tokens: train, and where there are any validation and test. Raises DataError for a broken row.

    Args:
        opened: the training sources, where they have been opened already.
    """
    opened = opened or open_training_sources(data, preference=preference)
    options = EncodingOptions(
        tokenizer=tokenizer,
        own_tokens=[*read_special_tokens(data.special_tokens), *listed_tokens(opened)],
        preference=preference,
        train_on=data.train_on,
        on_overlong=data.on_overlong,
        max_length=max_length,
        num_proc=data.num_proc,
        progress=progress,
    )

    def draft(name: str, sources: list[EncodedSource], chosen: np.ndarray | None = None) -> Draft:
        every = np.arange(sum(len(source) for source in sources))
        return Draft(name=name, sources=sources, chosen=every if chosen is None else chosen, max_length=max_length)

    configs = [config for _, config in training_sources(data)]
    sources = [encode_source(source, config, options) for source, config in zip(opened, configs, strict=True)]
    train = draft("train", sources)
    others = []
    if isinstance(data.validation, float | int):
        held_out = held_out_indices(train.column("group"), data.validation)
        rest = np.delete(np.arange(len(train)), held_out)
        if not len(rest):
            raise DataError(f"data.validation={data.validation} holds out all {len(train)} rows; null holds out none.")
        others.append(draft("validation", sources, held_out))
        train = draft("train", sources, rest)
    for name in ("validation", "test"):
        value = getattr(data, name)
        if value is not None and not isinstance(value, float | int):
            key = f"data.{name}"
            config = split_source(data, value, key)
            source = open_source(config, key=key, preference=preference)
            others.append(draft(name, [encode_source(source, config, options)]))
            setattr(data, name, _with_commit(value, config))
    return [train, *others]


def _with_commit(value: Any, source: SourceConfig) -> Any:
    """`value` of data.validation or data.test, and the commit that its own data set or revision was found at.

    What is another split of the training rows' data set has their commit, which `data.commit` says.
    """
    own = isinstance(value, Mapping) and ("hub_id" in value or "revision" in value)
    return {**value, "commit": source.commit} if own and source.commit else value


def held_out_indices(groups: np.ndarray, share: float) -> np.ndarray:
    """The rows to hold out: by a hash of their content, so that a duplicate is on the same side and no seed moves it.

    Of pairs it is the prompt's. At least one row is held out, the one with the smallest hash.
    """
    limit = np.uint64(max(int(share * 2**64), int(groups.min()) + 1))
    return np.flatnonzero(groups < limit)


def problems_of(drafts: list[Draft], data: DataConfig, *, context_length: int | None) -> list[str]:
    """What keeps these rows from being trained on, counted over all splits, so that following the advice is enough."""
    total = sum(map(len, drafts))
    problems = []
    overlong = sum(int(draft.overlong.sum()) for draft in drafts)
    if overlong and data.on_overlong != "drop":
        first = next(draft for draft in drafts if draft.overlong.any())
        place, limit = first.place(int(np.argmax(first.overlong))), first.max_length
        longest = max(int(draft.lengths.max()) for draft in drafts)
        fits = context_length is None or longest <= context_length
        ways = [f"data.max_length={longest} takes them all"] if fits else []
        ways += ["data.on_overlong=drop leaves them out"]
        if data.on_overlong == "error":
            if any(source.layout != "text" for source in first.sources):
                ways += ["truncate_prompt shortens prompts from the front"]
            if "input_ids" in first.sources[0].examples.column_names:  # a pair cannot be split
                ways += ["split makes several rows of a long conversation"]
            said = f"{overlong:,} of {total:,} rows exceed {limit:,} tokens"
        else:
            said = (
                f"{overlong:,} of {total:,} rows exceed {limit:,} tokens even with data.on_overlong={data.on_overlong}"
            )
        more = "" if fits else f", the longest with {longest:,} (the model takes {context_length:,})"
        problems.append(f"{said}{more} (the first: {place}): {', '.join(ways)}.")
    empty = sum(int(draft.empty.sum()) for draft in drafts)
    if empty and data.on_empty == "error":
        first = next(draft for draft in drafts if draft.empty.any())
        index = int(np.argmax(first.empty))
        problems.append(
            f"{empty:,} of {total:,} rows have nothing to learn from with data.train_on={data.train_on} (the first: "
            f"{first.place(index)}: {write_example(first.example(index))[:EXCERPT]}); "
            "data.on_empty=drop leaves them out."
        )
    for draft in drafts:
        if len(draft) and not (~draft.overlong & ~draft.empty).any() and not problems:
            problems.append(f"{draft.sources[0].name}: all {len(draft):,} rows are dropped; nothing is left.")
    return problems
