"""Which rows a preview shows, and what it says of each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmkit.config.schema import DataConfig
from llmkit.data.drafts import Draft
from llmkit.data.encoding.batches import IGNORED
from llmkit.data.preview.pieces import Gap, Piece, PieceReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A row, or one part of a pair."""

    name: str  # prompt, chosen or rejected; empty for a conversation
    tokens: int
    learnt: int
    parts: list[Piece | Gap]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRow:
    """One example as training sees it."""

    split: str
    place: str
    remark: str  # why training does not take it; empty where it does
    sections: list[Section]

    @property
    def title(self) -> str:
        """`train: chats.jsonl, row 3`."""
        return f"{self.split}: {self.place}"


def shown_rows(
    drafts: list[Draft], reader: PieceReader, data: DataConfig, *, count: int, most_pieces: int, most_runs: int
) -> list[ShownRow]:
    """The first `count` training rows, a share of them from each source, one row of each held-out source, and the first
    row of each kind that training does not take."""
    picked = list(dict.fromkeys(_picks(drafts, count))) if count else []
    return [_shown(drafts[d], index, reader, data, most_pieces, most_runs) for d, index in picked]


def _picks(drafts: list[Draft], count: int) -> Iterator[tuple[int, int]]:
    """(number of the draft, index in it)."""
    train = drafts[0]
    share, more = divmod(count, len(train.sources))
    source_of = _source_of(train)
    for number in range(len(train.sources)):
        wanted = max(share + (number < more), 1)
        yield from ((0, int(index)) for index in np.flatnonzero(source_of == number)[:wanted])
    for number, draft in enumerate(drafts[1:], start=1):
        if draft.sources[0] is not train.sources[0]:  # else a share of rows that are shown already
            yield number, 0
    for faulty in ([draft.overlong for draft in drafts], [draft.empty for draft in drafts]):
        found = next(((number, int(np.argmax(rows))) for number, rows in enumerate(faulty) if rows.any()), None)
        if found is not None:
            yield found


def _source_of(draft: Draft) -> np.ndarray:
    """The number of the source of every example."""
    ends = np.cumsum([len(source) for source in draft.sources])
    return np.searchsorted(ends, draft.chosen, side="right")


def _shown(
    draft: Draft, index: int, reader: PieceReader, data: DataConfig, most_pieces: int, most_runs: int
) -> ShownRow:
    values = draft.encoded(index)

    def section(name: str, ids: list[int], learnt: list[bool]) -> Section:
        parts = reader.parts(ids, learnt, most_pieces=most_pieces, most_runs=most_runs)
        return Section(name=name, tokens=len(ids), learnt=sum(learnt), parts=parts)

    if "labels" in values:
        learnt = [label != IGNORED for label in values["labels"]]
        learnt[:1] = [False] * len(learnt[:1])  # nothing predicts the first token
        sections = [section("", values["input_ids"], learnt)]
    else:
        sections = [
            section(name, ids := values[f"{name}_ids"], [name != "prompt"] * len(ids))
            for name in ("prompt", "chosen", "rejected")
        ]
    remark = _remark(draft, index, data)
    return ShownRow(split=draft.name, place=draft.place(index), remark=remark, sections=sections)


def _remark(draft: Draft, index: int, data: DataConfig) -> str:
    if draft.overlong[index]:
        words = f"{draft.lengths[index]:,} tokens, {draft.max_length:,} at most"
        return f"{'dropped' if data.on_overlong == 'drop' else 'stops training'}: {words}"
    if draft.empty[index]:
        return f"{'dropped' if data.on_empty == 'drop' else 'stops training'}: nothing to learn from"
    return ""
