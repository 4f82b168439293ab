"""How well a model does on rows: which rows, what is measured on them, and where it is kept.

evaluation.json            {"evaluations": [...]}, the newest last, each with its figures and their 95% intervals
evaluation_answers.jsonl   of the newest that has any: prompt, answer, expected, matches
"""

import dataclasses
import datetime
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmkit import durable, rundir
from llmkit.config import TrainConfig
from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.examples import Conversation
from llmkit.data.prepare import Split, prepare_data
from llmkit.data.reading.sources import split_source
from llmkit.errors import ConfigError
from llmkit.model.adapters import mend_head
from llmkit.serving.answers import Answering
from llmkit.serving.loaded import Loaded
from llmkit.training.estimate import Estimate, ratio, share
from llmkit.training.figures import questions
from llmkit.training.final_test import by_row, row_losses
from llmkit.training.generation import Answer
from llmkit.training.preferences import preferred

EVALUATIONS, ANSWERS = "evaluation.json", "evaluation_answers.jsonl"
MORE_THAN_EXPECTED = 8  # tokens that an answer may be longer than the longest expected one, its end among them


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows to measure on."""

    said: str  # what they are, in words
    dataset: datasets.Dataset  # in tokens, as a trainer would take them
    lengths: np.ndarray  # of each in tokens
    origins: np.ndarray  # see Split
    asked: list[Conversation]  # up to and with the answer that is expected; empty of pairs
    fingerprint: str

    @property
    def are_pairs(self) -> bool:
        return "prompt_ids" in self.dataset.column_names


def find_rows(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    said: str,
    whole: bool,
    limit: int | None,
    told: Callable[[str, int], None],
) -> Rows:
    """The rows that a config has to measure on: `data.test`, else what it holds out.

    Args:
        config: its `data.max_length` is set.
        said: whose data it is.
        whole: all of its rows, where neither test nor held-out rows are named.
        limit: the first so many only.

    Raises:
        ConfigError: if there are none.
        DataError: if they cannot be used.
    """
    data, preference = config.data, config.recipe == "dpo"
    assert data.max_length is not None, "settle_lengths() fills it in"
    named = next((name for name in ("test", "validation") if _names_rows(getattr(data, name))), None)
    if named is not None:
        rows = _alone(data, split_source(data, getattr(data, named), f"data.{named}"))
        said = f"data.{named} of {said}"
    elif whole:
        rows = _alone(data, *data.datasets)
    elif data.validation:
        rows, said = dataclasses.replace(data, packing="none", test=None), f"the held-out rows of {said}"
    else:
        raise ConfigError(f"{said} has no test and no held-out rows; name some: data.path=FILE.")
    prepared = prepare_data(rows, tokenizer, max_length=data.max_length, preference=preference, progress=told)
    split = prepared.validation if prepared.validation is not None else prepared.train
    return _rows(split, said, prepared.fingerprint, limit, pairs=preference)


def _names_rows(value: Any) -> bool:
    """Whether a value of data.test or data.validation names rows of its own, and no share of the training rows."""
    return value is not None and not isinstance(value, float | int)


def _alone(data: DataConfig, *sources: SourceConfig) -> DataConfig:
    """The settings of `data` for the rows of these sources alone (none: its own), each of them once."""
    once: dict[str, Any] = {"weight": None, "repeat": 1}
    fields = [field.name for field in dataclasses.fields(SourceConfig)]
    only = {name: getattr(sources[0], name) for name in fields} if len(sources) == 1 else {}
    several = [dataclasses.replace(source, **once) for source in sources] if len(sources) > 1 else []
    return dataclasses.replace(data, **only | once, datasets=several, validation=None, test=None, packing="none")


def _rows(split: Split, said: str, fingerprint: str, limit: int | None, *, pairs: bool) -> Rows:
    count = min(limit or len(split), len(split))
    first = range(count)
    return Rows(
        said=said if count == len(split) else f"the first {count:,} of {said}",
        dataset=split.dataset.select(first),
        lengths=np.asarray(split.rows[:count]["length"]),
        origins=split.origins[:count],
        asked=[] if pairs else questions(split, count),
        fingerprint=fingerprint,
    )


def answer_limit(tokenizer: PreTrainedTokenizerBase, asked: list[Conversation]) -> int:
    """How many tokens an answer needs to be right, and a few more, so that one that goes on is seen to."""
    expected = tokenizer([one.messages[-1]["content"] for one in asked], add_special_tokens=False)
    return max(map(len, expected["input_ids"])) + MORE_THAN_EXPECTED


def measure_answers(
    answering: Answering, rows: Rows, *, max_new_tokens: int, told: Callable[[int], None]
) -> tuple[dict[str, Estimate], list[Answer]]:
    """How many answers are, word for word, the expected ones; and the answers."""
    if not rows.asked:
        return {}, []
    answers = answering.answer(rows.asked, max_new_tokens=max_new_tokens, told=told)
    right = sum(answer.matches for answer in answers)
    independent = min(len(np.unique(rows.origins)), len(answers))
    return {"exact_match": share(right, len(answers), rows=independent)}, answers


def measure_likelihood(loaded: Loaded, rows: Rows, *, batch_size: int) -> dict[str, Estimate]:
    """Of conversations the loss in nats per learnt token; of pairs how often the chosen answer is the likelier one."""
    scorer = _Scorer(loaded, batch_size=batch_size, pairs=rows.are_pairs)
    if rows.are_pairs:
        right = preferred(scorer, rows.dataset, len(rows.dataset))
        return {"preference_accuracy": share(sum(right), len(right))}
    order = np.argsort(-rows.lengths, kind="stable")  # like lengths together: less padding
    sums, counts = row_losses(scorer, rows.dataset.select(order))
    return {"loss": ratio(by_row(sums, rows.origins[order]), by_row(counts, rows.origins[order]))}


class _Scorer:
    """What the figures ask of a trainer, for a model that is loaded to answer."""

    def __init__(self, loaded: Loaded, *, batch_size: int, pairs: bool):
        from trl.trainer.dpo_trainer import DataCollatorForPreference
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
        from trl.trainer.utils import add_fused_lm_head

        model = loaded.model
        add_fused_lm_head(model.get_base_model() if hasattr(model, "peft_config") else model)
        mend_head(model)
        collator = DataCollatorForPreference if pairs else DataCollatorForLanguageModeling
        self.model, self._device = model, loaded.device
        self.data_collator = collator(pad_token_id=loaded.tokenizer.pad_token_id)
        self.args = _Arguments(per_device_eval_batch_size=batch_size)
        self.accelerator = self
        self.autocast = self.compute_loss_context_manager = loaded.arithmetic

    def _prepare_inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values.to(self._device) for name, values in batch.items()}


@dataclass(frozen=True)
class _Arguments:
    per_device_eval_batch_size: int


def keep(home: Path, record: dict[str, Any], figures: dict[str, Estimate], answers: list[Answer]) -> dict[str, Any]:
    """Add an evaluation to those kept in `home`, and write its answers; returns its record."""
    home.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"date": now} | record | {"figures": {name: asdict(figure) for name, figure in figures.items()}}
    with _locked(home):
        earlier = rundir.read_json(home / EVALUATIONS) or {}
        rundir.write_json(home / EVALUATIONS, {"evaluations": [*earlier.get("evaluations", []), record]})
        if answers:
            lines = (json.dumps(asdict(a) | {"matches": a.matches}, ensure_ascii=False) + "\n" for a in answers)
            durable.write_text(home / ANSWERS, "".join(lines))
    return record


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Two evaluations of one run that end together wait for each other."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
