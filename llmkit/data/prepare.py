"""Rows -> token ids and labels, with every row accounted for.

The result goes to the trainer as it is (`input_ids`, `labels`): what is trained on is what was checked here.
"""

from dataclasses import dataclass
from hashlib import blake2b

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig
from llmkit.data.formats import Message, to_messages
from llmkit.data.masks import Span, answer_spans, render
from llmkit.data.sources import Row, read_training_rows, read_validation_rows
from llmkit.errors import DataError

IGNORED = -100  # the label that PyTorch's cross entropy skips
TOKENIZED_AT_ONCE = 1000  # rows; their offsets are Python objects, many times the size of the ids


@dataclass(frozen=True, kw_only=True)
class Split:
    """Prepared rows: `dataset` has input_ids and labels; `messages` are the same rows for generation."""

    dataset: datasets.Dataset
    messages: list[list[Message]]
    tokens: int
    supervised_tokens: int
    longest: int
    dropped: dict[str, int]
    end_tokens: frozenset[int]  # the tokens that answers end with

    def __len__(self) -> int:
        return len(self.messages)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    train: Split
    validation: Split | None
    fingerprint: str


def prepare_data(data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> PreparedData:
    """Read, hold out, render, tokenize and mask.

    Args:
        max_length: longest row in tokens; longer ones are an error or dropped (`data.on_overlong`).

    Raises:
        DataError: names file and row, or counts rows and says what would help.
    """
    rows = read_training_rows(data)
    messages = to_messages(rows, data.format)
    encoded = []
    if isinstance(data.validation, str):
        held_out_rows = read_validation_rows(data.validation)
        encoded.append(encode(held_out_rows, to_messages(held_out_rows, data.format), tokenizer))
    elif data.validation:
        chosen = held_out_indices(messages, data.validation)
        rest = sorted(set(range(len(rows))) - set(chosen))
        if not rest:
            raise DataError(f"data.validation={data.validation} holds out all {len(rows)} rows; null holds out none.")
        encoded.append(encode([rows[i] for i in chosen], [messages[i] for i in chosen], tokenizer))
        rows, messages = [rows[i] for i in rest], [messages[i] for i in rest]
    encoded.insert(0, encode(rows, messages, tokenizer))
    check_rows(encoded, data, max_length=max_length)
    train, *held_out = [select(rows_of_split, max_length=max_length) for rows_of_split in encoded]
    validation = held_out[0] if held_out else None
    return PreparedData(train=train, validation=validation, fingerprint=_fingerprint(train, validation))


def held_out_indices(messages: list[list[Message]], share: float) -> list[int]:
    """The rows to hold out: by a hash of their content, so that a duplicate is on the same side and no seed moves it.

    At least one row, the one with the smallest hash.
    """
    digests = [_content_hash(conversation) for conversation in messages]
    limit = max(int(share * 2**64), min(digests) + 1)
    return [index for index, digest in enumerate(digests) if digest < limit]


def _content_hash(conversation: list[Message]) -> int:
    text = "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in conversation)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Rows in tokens, before any is refused or dropped. `empty` rows have no answer to learn from."""

    rows: list[Row]
    messages: list[list[Message]]
    texts: list[str]
    ids: list[np.ndarray]
    labels: list[np.ndarray]
    lengths: np.ndarray
    supervised: np.ndarray
    empty: np.ndarray


def encode(rows: list[Row], messages: list[list[Message]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Token ids of each rendered conversation; labels are the ids inside answers and IGNORED elsewhere."""
    texts, spans = [], []
    for row, conversation in zip(rows, messages, strict=True):
        try:
            text = render(tokenizer, conversation)
            spans.append(answer_spans(tokenizer, conversation, text))
        except DataError as error:
            raise DataError(f"{row.place()}: {error}") from error
        except Exception as error:  # a template raises what it likes (jinja2.TemplateError, KeyError, ...)
            raise DataError(f"{row.place()}: the chat template refuses it: {error}") from error
        texts.append(text)
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        part = slice(start, start + TOKENIZED_AT_ONCE)
        # The template writes the special tokens; the tokenizer must not add its own a second time.
        tokens = tokenizer(texts[part], add_special_tokens=False, return_offsets_mapping=True)
        for row_ids, offsets, row_spans in zip(tokens["input_ids"], tokens["offset_mapping"], spans[part], strict=True):
            ids.append(np.asarray(row_ids, dtype=np.int32))
            labels.append(_labels(ids[-1], np.asarray(offsets, dtype=np.int64).reshape(-1, 2), row_spans))
    supervised = np.array([(row_labels != IGNORED).sum() for row_labels in labels])
    # An end of turn alone is nothing to learn.
    blank = np.array([not any(m["content"].strip() for m in turns if m["role"] == "assistant") for turns in messages])
    return Encoded(
        rows=rows,
        messages=messages,
        texts=texts,
        ids=ids,
        labels=labels,
        lengths=np.array([len(row_ids) for row_ids in ids]),
        supervised=supervised,
        empty=(supervised == 0) | blank,
    )


def check_rows(splits: list[Encoded], data: DataConfig, *, max_length: int) -> None:
    """Refuse rows that are too long or have nothing to learn, unless they are to be dropped.

    Raises DataError that counts over all splits, so that following its advice is enough.
    """
    total = sum(len(split.rows) for split in splits)
    overlong = [(split, int(i)) for split in splits for i in np.flatnonzero(split.lengths > max_length)]
    if overlong and data.on_overlong == "error":
        (first, index), longest = overlong[0], max(int(split.lengths.max()) for split in splits)
        raise DataError(
            f"{len(overlong):,} of {total:,} rows exceed {max_length:,} tokens (the first: "
            f"{first.rows[index].place()}): data.max_length={longest} takes them all, "
            "data.on_overlong=drop leaves them out."
        )
    empty = [(split, int(i)) for split in splits for i in np.flatnonzero(split.empty)]
    if empty and data.on_empty == "error":
        first, index = empty[0]
        raise DataError(
            f"{len(empty):,} of {total:,} rows have no answer to learn from (the first: {first.rows[index].place()}: "
            f"{first.texts[index][:200]!r}); data.on_empty=drop leaves them out."
        )


def select(rows: Encoded, *, max_length: int) -> Split:
    """The rows that stay, as the trainer takes them. Raises DataError if none does."""
    overlong = rows.lengths > max_length
    keep = np.flatnonzero(~overlong & ~rows.empty)
    if not len(keep):
        raise DataError(f"{rows.rows[0].source}: all {len(rows.rows):,} rows are dropped; nothing is left.")
    ids, labels = [rows.ids[i] for i in keep], [rows.labels[i] for i in keep]
    return Split(
        dataset=datasets.Dataset(pa.table({"input_ids": _arrow_lists(ids), "labels": _arrow_lists(labels)})),
        messages=[rows.messages[i] for i in keep],
        tokens=int(rows.lengths[keep].sum()),
        supervised_tokens=int(rows.supervised[keep].sum()),
        longest=int(rows.lengths[keep].max()),
        dropped={"overlong": int(overlong.sum()), "empty": int((rows.empty & ~overlong).sum())},
        end_tokens=frozenset(int(token) for row_labels in labels for token in _last_of_each_answer(row_labels)),
    )


def _labels(ids: np.ndarray, offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """A token is learnt if it begins inside an answer; one that the template glued to the prompt is not."""
    # Some byte-level tokenizers (Llama 3) leave leading spaces out of a token's offsets, and a token of spaces is left
    # with nothing: it really begins where the token before it ends.
    begins = np.minimum(offsets[:, 0], np.append(0, offsets[:, 1])[: len(offsets)])
    learnt = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        learnt |= (begins >= start) & (begins < end)
    return np.where(learnt, ids, np.int32(IGNORED))


def _last_of_each_answer(labels: np.ndarray) -> np.ndarray:
    learnt = labels != IGNORED
    return labels[learnt & ~np.append(learnt[1:], False)]


def _arrow_lists(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.append(0, np.cumsum([len(array) for array in arrays]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), np.concatenate(arrays))


def _fingerprint(*splits: Split | None) -> str:
    """A hash of all ids and labels: equal data, equal fingerprint."""
    digest = blake2b(digest_size=16)
    for split in splits:
        if split is not None:
            for column in ("input_ids", "labels"):
                for chunk in split.dataset.data.column(column).chunks:
                    digest.update(chunk.offsets.to_numpy().tobytes())
                    digest.update(chunk.values.to_numpy().tobytes())
    return digest.hexdigest()
