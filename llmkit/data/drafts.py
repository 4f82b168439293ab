"""The splits in tokens, before any row is refused or dropped: what the audit looks at."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.encoding.batches import read_example, write_example
from llmkit.data.encoding.cache import EncodedSource, EncodingOptions, encode_source
from llmkit.data.examples import Example
from llmkit.data.reading.sources import split_source
from llmkit.data.rows import EXCERPT
from llmkit.errors import DataError


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

    def example(self, index: int) -> Example:
        """The chosen example `index` in its internal form."""
        source, inner = self._find(index)
        return read_example(source.examples[inner]["example"])

    def _find(self, index: int) -> tuple[EncodedSource, int]:
        position = int(self.chosen[index])
        for source in self.sources:
            if position < len(source):
                return source, position
            position -= len(source)
        raise IndexError(index)

    def __len__(self) -> int:
        return len(self.chosen)


def draft_splits(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    preference: bool,
    progress: Callable[[str, int], None] | None = None,
) -> list[Draft]:
    """The splits in tokens: train, and where there are any validation and test. Raises DataError for a broken row."""
    options = EncodingOptions(
        tokenizer=tokenizer,
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

    sources = [encode_source(config, options, key=key) for key, config in training_sources(data)]
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
            others.append(draft(name, [encode_source(split_source(data, value, key), options, key=key)]))
    return [train, *others]


def training_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The sources of the training rows, with the config's name for each."""
    if data.datasets:
        return [(f"data.datasets[{index}]", source) for index, source in enumerate(data.datasets)]
    return [("data", data)]


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
