"""What a run would train on, looked at: the splits in tokens, rows to show, the audit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig, TrainConfig
from llmkit.data.audit import audit
from llmkit.data.drafts import Draft, draft_splits, problems_of
from llmkit.data.preview.pieces import PieceReader
from llmkit.data.preview.rows import ShownRow, shown_rows
from llmkit.data.reading.sources import Source, listed_tokens, open_training_sources, training_sources
from llmkit.model.context import settle_lengths
from llmkit.model.special_tokens import new_tokens
from llmkit.model.tokenizer import load_original_tokenizer, load_run_tokenizer, may_add_tokens


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the rows are encoded with."""

    tokenizer: PreTrainedTokenizerBase
    new: frozenset[int]  # tokens that the model did not know
    max_length: int
    preference: bool
    opened: list[Source]  # of the training rows


@dataclass(frozen=True, kw_only=True)
class Report:
    """The data of one config."""

    data: DataConfig
    drafts: list[Draft]
    reader: PieceReader
    audit: dict[str, Any]  # see data/audit.py

    def rows(self, count: int, most_pieces: int, most_runs: int) -> list[ShownRow]:
        """See `rows.shown_rows`."""
        return shown_rows(
            self.drafts, self.reader, self.data, count=count, most_pieces=most_pieces, most_runs=most_runs
        )


def run_inputs(config: TrainConfig) -> Inputs:
    """The tokenizer and the lengths that a run of `config` would have; completes `config` in place as the run does.

    Raises ConfigError for a model that cannot be had.
    """
    max_length = settle_lengths(config)
    preference = config.recipe == "dpo"
    opened = open_training_sources(config.data, preference=preference)
    beside = listed_tokens(opened)
    tokenizer = load_run_tokenizer(config, beside)
    new: dict[str, int] = {}
    if may_add_tokens(config, beside):
        new = new_tokens(tokenizer, load_original_tokenizer(config.model))
    return Inputs(
        tokenizer=tokenizer, new=frozenset(new.values()), max_length=max_length, preference=preference, opened=opened
    )


def look(config: TrainConfig, inputs: Inputs, *, progress: Callable[[str, int], None]) -> Report:
    """Prepare the data and audit it. Raises DataError for a row that cannot be used.

    Args:
        progress: called with a source's name and its rows so far, while they are encoded.
    """
    data, tokenizer = config.data, inputs.tokenizer
    drafts = draft_splits(
        data,
        tokenizer,
        max_length=inputs.max_length,
        preference=inputs.preference,
        opened=inputs.opened,
        progress=progress,
    )
    problems = problems_of(drafts, data, context_length=config.model.context_length)
    return Report(
        data=data,
        drafts=drafts,
        reader=PieceReader(tokenizer, new=inputs.new),
        audit=audit(drafts, tokenizer, data, problems=problems),
    )


def data_name(data: DataConfig) -> str:
    """The sources in words."""
    return ", ".join(str(source.path or source.hub_id) for _, source in training_sources(data))
