"""From the config's sources to what the trainer takes, with every row accounted for.

What is trained on is what was checked here: the trainers get token ids and labels and prepare nothing themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig
from llmkit.data.audit import audit, training_indices
from llmkit.data.drafts import Draft, draft_splits, origins, problems_of
from llmkit.data.encoding.batches import read_example
from llmkit.data.examples import Example
from llmkit.data.packing import pack
from llmkit.data.reading.sources import Source
from llmkit.errors import DataError

TRAINED_COLUMNS = {False: ["input_ids", "labels"], True: ["prompt_ids", "chosen_ids", "rejected_ids"]}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Prepared examples. `dataset` is what the trainer takes, where packing puts several into one row."""

    dataset: datasets.Dataset
    rows: datasets.Dataset  # one example each, with its facts
    tokens: int
    supervised_tokens: int
    longest: int
    dropped: dict[str, int]
    end_tokens: frozenset[int]  # the tokens that answers end with
    origins: np.ndarray  # of each row the number of what it came from: the parts of a row that was split share it

    def __len__(self) -> int:
        return len(self.rows)

    def examples(self, count: int) -> list[Example]:
        """The first `count` conversations or preferences in their internal form."""
        return [read_example(text) for text in self.rows[: min(count, len(self))]["example"]]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    train: Split
    validation: Split | None
    test: Split | None
    fingerprint: str
    audit: dict[str, Any]  # what data_audit.json holds


def prepare_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context_length: int | None = None,
    preference: bool = False,
    opened: list[Source] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> PreparedData:
    """Read, encode or find in the cache, hold out, refuse or drop, mix and pack.

    Args:
        max_length: longest row in tokens.
        context_length: the most the model takes, which advice stays below.
        preference: pairs for DPO instead of conversations.
        opened: the training sources, where they have been opened already.
        progress: called with a source's name and its rows so far, while they are encoded; what it raises ends that.

    Raises:
        DataError: names file and row, or counts rows and says what would help.
    """
    drafts = draft_splits(
        data, tokenizer, max_length=max_length, preference=preference, opened=opened, progress=progress
    )
    if problems := problems_of(drafts, data, context_length=context_length):
        raise DataError(*problems)
    found = audit(drafts, tokenizer, data, problems=[])
    splits = {draft.name: _split(draft, data, preference=preference) for draft in drafts}
    digest = blake2b(digest_size=16)
    for name in sorted(splits):
        digest.update(f"{name} {splits[name][1]}".encode())
    return PreparedData(
        train=splits["train"][0],
        validation=splits["validation"][0] if "validation" in splits else None,
        test=splits["test"][0] if "test" in splits else None,
        fingerprint=digest.hexdigest(),
        audit=found,
    )


def _split(draft: Draft, data: DataConfig, *, preference: bool) -> tuple[Split, str]:
    """The split and a hash of its content and order."""
    chosen = draft.chosen[~draft.overlong & ~draft.empty] if draft.name != "train" else training_indices(draft, data)
    digest = blake2b(digest_size=16)
    for source in draft.sources:
        digest.update(source.digest.encode())
    digest.update(chosen.tobytes())
    every = datasets.concatenate_datasets([source.examples for source in draft.sources])
    rows = every if len(chosen) == len(every) and (np.diff(chosen) == 1).all() else every.select(chosen)
    dataset = rows.select_columns(TRAINED_COLUMNS[preference])
    if draft.name == "train" and data.packing == "bfd":
        dataset = pack(dataset, max_length=draft.max_length, fingerprint=digest.hexdigest())
        digest.update(f"packed {draft.max_length}".encode())
    everywhere = {
        name: np.concatenate([source.column(name) for source in draft.sources])[chosen] for name in ("length", "learnt")
    }
    split = Split(
        dataset=dataset,
        rows=rows,
        tokens=int(everywhere["length"].sum()),
        supervised_tokens=int(everywhere["learnt"].sum()),
        longest=int(everywhere["length"].max()),
        dropped={"overlong": int(draft.overlong.sum()), "empty": int(draft.empty.sum())},
        end_tokens=frozenset(token for source in draft.sources for token in source.notes.end_tokens),
        origins=origins(draft.sources)[chosen],
    )
    return split, digest.hexdigest()
