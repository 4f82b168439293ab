"""The recipes' trainers on model=tiny and rows of random tokens, built as the recipes build them."""

import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from transformers import AutoTokenizer, set_seed

IGNORED = -100  # the label that cross entropy skips
WORDS = range(6, 640)  # token ids of model=tiny that are not special


def random_rows(lengths: list[int], *, learnt: list[int] | None = None, seed: int = 0) -> datasets.Dataset:
    """Rows of the given lengths in tokens; of each the last `learnt` tokens are supervised (default: half)."""
    draw = random.Random(seed)
    ids = [draw.choices(WORDS, k=length) for length in lengths]
    counts = learnt or [length // 2 for length in lengths]
    labels = [[IGNORED] * (len(row) - count) + row[len(row) - count :] for row, count in zip(ids, counts, strict=True)]
    return _table(input_ids=ids, labels=labels)


def random_pairs(lengths: list[tuple[int, int, int]], *, seed: int = 0) -> datasets.Dataset:
    """Pairs with prompt, chosen and rejected of the given lengths in tokens."""
    draw = random.Random(seed)
    columns = zip(*([draw.choices(WORDS, k=length) for length in row] for row in lengths), strict=True)
    return _table(**dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, columns), strict=True)))


def _table(**columns: list[list[int]]) -> datasets.Dataset:
    lists = pa.list_(pa.int32())
    return datasets.Dataset(pa.table({name: pa.array(values, lists) for name, values in columns.items()}))


def make_trainer(
    config: Any, run_dir: Path, train: datasets.Dataset, evaluation: datasets.Dataset | None = None, **changes: Any
) -> Any:
    """A fresh trainer of `config.recipe` on a fresh model; `changes` to the trainer's arguments win over the config."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from trl import DPOConfig, SFTConfig

    from llmkit.model.loading import load_model
    from llmkit.model.methods import apply_method, loading_dtype
    from llmkit.model.tiny import tiny_model
    from llmkit.training.arguments import dpo_arguments, total_steps, training_arguments
    from llmkit.training.facts import complete_config, settle_gradient_checkpointing

    # One process, one precision: accelerate remembers the first, so a new trainer starts from nothing.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    run_dir.mkdir(exist_ok=True)
    device, precision, *_ = complete_config(config)
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    dtype = loading_dtype(config, precision)
    model: Any = load_model(config.model, dtype=dtype, device=device, quantization=None, precision=precision)
    model = apply_method(model, config, precision)
    settle_gradient_checkpointing(config, model)
    settings = training_arguments(
        config,
        output_dir=run_dir / "checkpoints",
        precision=precision,
        device=device,
        steps=total_steps(config.training, len(train)),
    )
    settings |= {"eval_strategy": "no"}
    parts = {
        "run_dir": run_dir,
        "model": model,
        "train_dataset": train,
        "eval_dataset": evaluation,
        "processing_class": tokenizer,
    }
    if config.recipe == "dpo":
        from llmkit.training.preference_trainer import PreferenceTrainer

        settings |= dpo_arguments(config.dpo)
        return PreferenceTrainer(args=DPOConfig(**settings | changes), continued=False, **parts)
    from llmkit.recipes.sft import Trainer

    settings |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return Trainer(args=SFTConfig(**settings | changes), **parts)


def trained_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the parameters that are trained."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
