"""Encoded examples and what was seen on the way, as they go from the processes that make them into the cache."""

import json
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llmkit.data.examples import Conversation, Example, Preference
from llmkit.data.rows import Row

IGNORED = -100  # the label that PyTorch's cross entropy skips

_TOKENS = pa.list_(pa.int32())
# Beside its tokens: all tokens, those learnt (0: nothing worth learning), a hash of the content, a hash of
# what must stay on one side of a split, the row, whether its text holds a special token, the content.
_FACTS = [("length", pa.int32()), ("learnt", pa.int32()), ("digest", pa.uint64()), ("group", pa.uint64())]
_FACTS += [("row", pa.int64()), ("control", pa.bool_()), ("example", pa.string())]
CONVERSATIONS = pa.schema([("input_ids", _TOKENS), ("labels", _TOKENS), *_FACTS])
PREFERENCES = pa.schema([("prompt_ids", _TOKENS), ("chosen_ids", _TOKENS), ("rejected_ids", _TOKENS), *_FACTS])


@dataclass(kw_only=True)
class Notes:
    """What was seen on the way, to be counted over all blocks."""

    end_tokens: Counter[int] = field(default_factory=Counter)  # the last tokens of answers
    own_tokens: Counter[int] = field(default_factory=Counter)  # of the tokens that the run adds, those in the rows
    unknown: int = 0  # unknown tokens
    truncated: int = 0  # rows shortened from the front
    answers_lost: int = 0  # answers to learn that shortened rows had
    split: int = 0  # rows made into several
    reasoning_lost: int = 0  # rows whose last answer was reasoned for, and the template leaves that out
    other_voices: int = 0  # pairs with turns of others than the assistant after the prompt, which are compared too

    def add(self, other: "Notes") -> None:
        """Count `other` in."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON holds them."""
        return vars(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Notes":
        """The counts from what `to_json` gave, once it has been JSON."""
        counters = ("end_tokens", "own_tokens")
        return cls(**values | {name: Counter({int(k): v for k, v in values[name].items()}) for name in counters})


class EncodedBlock(NamedTuple):
    """One block of a source: how many rows it had, their examples, and what was seen."""

    source: str
    rows: int
    batch: pa.RecordBatch
    notes: Notes


class Encoded(NamedTuple):
    """One example: its ids are (input_ids, labels) of a conversation, (prompt, chosen, rejected) of a preference."""

    row: Row
    ids: tuple[np.ndarray, ...]
    learnt: int
    digest: int  # of the whole row, also where this is a part of it: parts of a row are never on both sides of a split
    group: int  # of what is never on both sides of a split: the row, or the prompt that several pairs share
    example: str


def record_batch(encoded: list[Encoded], schema: pa.Schema, *, control: list[bool]) -> pa.RecordBatch:
    """The examples as a record batch of CONVERSATIONS or PREFERENCES.

    Args:
        control: of each whether its text holds a special token.
    """
    arrays: list[Any] = [_lists([one.ids[i] for one in encoded]) for i in range(len(schema) - len(_FACTS))]
    if schema is PREFERENCES:
        lengths = [len(one.ids[0]) + max(len(one.ids[1]), len(one.ids[2])) for one in encoded]
    else:
        lengths = [len(one.ids[0]) for one in encoded]
    facts: list[list[Any]] = [
        lengths,
        [one.learnt for one in encoded],
        [one.digest for one in encoded],
        [one.group for one in encoded],
        [one.row.number for one in encoded],
        control,
        [one.example for one in encoded],
    ]
    arrays += [pa.array(values, kind) for values, (_, kind) in zip(facts, _FACTS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.append(0, np.cumsum([len(array) for array in arrays])).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def write_example(example: Example) -> str:
    """An example as the `example` column holds it."""
    if isinstance(example, Preference):
        values: dict[str, Any] = {name: getattr(example, name) for name in ("prompt", "chosen", "rejected")}
    elif example.text is not None:
        values = {"text": example.text}
    else:
        values = {"messages": example.messages}
    if example.tools:
        values["tools"] = example.tools
    return json.dumps(values, ensure_ascii=False)


def read_example(text: str) -> Example:
    """An example from the `example` column."""
    values = json.loads(text)
    if "prompt" in values:
        return Preference(**values)
    return Conversation(messages=values.pop("messages", []), **values)


def content_hash(example: str) -> int:
    """64 bits that stand for the content of an example, the same in every run."""
    return int.from_bytes(blake2b(example.encode(), digest_size=8).digest(), "big")
