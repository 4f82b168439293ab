"""The audit: what the data holds, in numbers, before a step is taken. The same for a preview and for a run.

`data_audit.json` holds one object (counts are of examples where nothing else is said; a row that was split is several):

    max_length   longest example in tokens
    preference   whether examples are pairs; `tokens` of a pair are those of its prompt and its longer answer,
                 `supervised_tokens` those of both answers
    splits       train, validation, test, those that there are:
        rows                              before anything is left out
        overlong, empty                   longer than max_length; nothing to learn from
        dropped                           of these, left out as data.on_overlong, data.on_empty say: a count each
        used                              what a pass takes: with `repeat` and `weight`, without what is dropped
        tokens, supervised_tokens         of what a pass takes; of all rows where training would stop
        duplicates                        repeat an earlier one of the split
        control_tokens                    hold a special token in their text, which is read as the token itself; of the
                                          first one control_example says place and token
        also_in_training                  (validation, test) are in the training split too
        length, supervised                tokens per row of the same: min, median, p95, max, mean, and a histogram:
                                          counts[i] rows from edges[i] to below edges[i + 1]
        longest                           place and tokens of the longest rows
    packing      rows, and how far they are filled on average (a share of max_length); null without packing
    sources      name, format, used_for (splits), rows (as read), examples, used (in a pass over the training data),
                 truncated (rows shortened from the front), answers_lost (that these had), split (rows made into
                 several), reasoning_lost (rows whose last answer's reasoning the template leaves out), other_voices
                 (pairs with turns of others than the assistant in an answer), unknown_tokens,
                 turns (answers to learn), turns_without_end (those that end in ordinary text)
    unseen_tokens  those of data.special_tokens, and listed beside the rows, that are in no training row
    problems     why training would stop at this data
    warnings     what deserves a look
"""

from bisect import bisect_left, insort
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig
from llmkit.data.audit_words import warnings_of
from llmkit.data.drafts import Draft
from llmkit.data.encoding.cache import EncodedSource
from llmkit.data.encoding.control_tokens import control_tokens
from llmkit.data.mixing import mixed_indices
from llmkit.data.reading.sources import training_sources
from llmkit.data.template_check import template_warnings

LONGEST_SHOWN = 5
BINS = 20
PACKED_TOGETHER = 1000  # TRL packs so many rows at a time: the batch size of `datasets.Dataset.map`


def audit(
    drafts: list[Draft], tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, problems: list[str]
) -> dict[str, Any]:
    """What `data_audit.json` holds, described above.

    Args:
        drafts: training first.
        data: what the drafts were made from.
        problems: why training would stop, by `drafts.problems_of`.
    """
    train = drafts[0]
    used = training_indices(train, data)
    splits = {}
    for draft in drafts:
        taken = used if draft is train else draft.chosen[~draft.overlong & ~draft.empty]
        splits[draft.name] = _split(draft, tokenizer, data, taken, whole=bool(problems) or not len(taken))
    for draft in drafts[1:]:
        splits[draft.name]["also_in_training"] = _shared(draft.column("digest"), train.column("digest"))
    sources = _sources(drafts, tokenizer, used)
    unseen = _unseen_tokens(train, tokenizer)
    return {
        "max_length": train.max_length,
        "preference": "chosen_ids" in train.sources[0].examples.column_names,
        "splits": splits,
        "packing": _packing(train, used) if data.packing == "bfd" else None,
        "sources": sources,
        "unseen_tokens": unseen,
        "problems": problems,
        "warnings": [
            *template_warnings(tokenizer, data),
            *warnings_of(splits, sources, train_on=data.train_on, unseen_tokens=unseen),
        ],
    }


def training_indices(train: Draft, data: DataConfig) -> np.ndarray:
    """What a pass over the training data takes, as indices into all its sources put together."""
    chosen = train.chosen[~train.overlong & ~train.empty]
    configs = [config for _, config in training_sources(data)]
    return mixed_indices(chosen, train.sources, configs)


def _split(
    draft: Draft, tokenizer: PreTrainedTokenizerBase, data: DataConfig, taken: np.ndarray, *, whole: bool
) -> dict[str, Any]:
    """Of one split; its tokens are of the examples `taken` (places in all its sources), or of the whole split."""
    overlong, empty = int(draft.overlong.sum()), int(draft.empty.sum())
    few = min(LONGEST_SHOWN, len(draft))
    longest = np.argpartition(-draft.lengths, few - 1)[:few]
    longest = longest[np.lexsort((longest, -draft.lengths[longest]))]
    counted = draft.chosen if whole else taken
    lengths, learnt = (
        np.concatenate([source.column(name) for source in draft.sources])[counted] for name in ("length", "learnt")
    )
    return {
        "rows": len(draft),
        "used": len(taken),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(learnt.sum()),
        "overlong": overlong,
        "empty": empty,
        "dropped": {
            "overlong": overlong if data.on_overlong == "drop" else 0,
            "empty": empty if data.on_empty == "drop" else 0,
        },
        "duplicates": _duplicates(draft),
        **_control_tokens(draft, tokenizer),
        "length": _distribution(lengths),
        "supervised": _distribution(learnt),
        "longest": [{"place": draft.place(int(index)), "tokens": int(draft.lengths[index])} for index in longest],
    }


def _duplicates(draft: Draft) -> int:
    """Rows that repeat another; the parts of one row, which share its hash, are one."""
    first_of_row = np.diff(draft.origins, prepend=-1) != 0
    ordered = np.sort(draft.column("digest")[first_of_row])  # a tenth of the time of np.unique (numpy 2.3)
    return int((ordered[1:] == ordered[:-1]).sum())


def _control_tokens(draft: Draft, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rows = draft.column("control")
    if not rows.any():
        return {"control_tokens": 0, "control_example": None}
    first = int(np.argmax(rows))
    pattern = control_tokens(tokenizer, draft.sources[0].own_tokens)
    found = pattern and pattern.search(draft.encoded(first)["example"])
    assert found, "the column says so"
    return {"control_tokens": int(rows.sum()), "control_example": f"{draft.place(first)}: {found[0]!r}"}


def _unseen_tokens(train: Draft, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    seen = {number for source in train.sources for number in source.notes.own_tokens}
    own = dict.fromkeys(train.sources[0].own_tokens)
    return [token for token in own if tokenizer.convert_tokens_to_ids(token) not in seen]


def _shared(digests: np.ndarray, others: np.ndarray) -> int:
    """How many of `digests` are in `others` too."""
    ordered = np.sort(others)
    nearest = np.minimum(np.searchsorted(ordered, digests), len(ordered) - 1)
    return int((ordered[nearest] == digests).sum())


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Tokens per row: a few quantiles, and a histogram whose bins are equally wide and begin at whole numbers."""
    least, most = int(values.min()), int(values.max())
    width = (most - least) // BINS + 1
    counts = np.bincount((values - least) // width)
    median, p95 = np.quantile(values, [0.5, 0.95])
    return {
        "min": least,
        "median": int(median),
        "p95": int(p95),
        "max": most,
        "mean": round(float(values.mean()), 1),
        "edges": [least + i * width for i in range(len(counts) + 1)],
        "counts": counts.tolist(),
    }


def _packing(train: Draft, used: np.ndarray) -> dict[str, Any]:
    lengths = np.concatenate([source.column("length") for source in train.sources])[used]
    parts = (lengths[i : i + PACKED_TOGETHER] for i in range(0, len(lengths), PACKED_TOGETHER))
    rows = sum(packed_rows(part, train.max_length) for part in parts)
    filled = int(lengths.sum()) / (rows * train.max_length) if rows else 0.0
    return {"rows": rows, "filled": round(filled, 4)}


def packed_rows(lengths: np.ndarray, max_length: int) -> int:
    """How many rows best-fit-decreasing packing makes of rows of these lengths, none above `max_length`."""
    spaces: list[int] = []  # left in each row, ascending
    rows = 0
    for length in np.sort(lengths)[::-1].tolist():
        best = bisect_left(spaces, length)
        space = spaces.pop(best) if best < len(spaces) else max_length
        rows += space == max_length
        if space > length:
            insort(spaces, space - length)
    return rows


def _sources(drafts: list[Draft], tokenizer: PreTrainedTokenizerBase, used: np.ndarray) -> list[dict[str, Any]]:
    closing = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    bounds = np.cumsum([0, *(len(source) for source in drafts[0].sources)])
    used_of_source = np.histogram(used, bounds)[0].tolist()
    found: list[tuple[EncodedSource, list[str]]] = []
    for draft in drafts:
        for source in draft.sources:
            # A held-out share is of the very sources of the training rows.
            known = next((splits for other, splits in found if other is source), None)
            if known is None:
                found.append((source, [draft.name]))
            else:
                known.append(draft.name)
    return [
        {
            "name": source.name,
            "format": source.layout,
            "used_for": splits,
            "rows": source.rows,
            "examples": len(source),
            "used": used_of_source[number] if number < len(used_of_source) else 0,
            "truncated": source.notes.truncated,
            "split": source.notes.split,
            "answers_lost": source.notes.answers_lost,
            "reasoning_lost": source.notes.reasoning_lost,
            "other_voices": source.notes.other_voices,
            "unknown_tokens": source.notes.unknown,
            "turns": sum(source.notes.end_tokens.values()),
            "turns_without_end": sum(count for token, count in source.notes.end_tokens.items() if token not in closing),
        }
        for number, (source, splits) in enumerate(found)
    ]
