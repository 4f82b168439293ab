"""Supervised fine-tuning: the model learns the assistant's turns of conversations.

    llmkit train data.path=chats.jsonl model=qwen3_0_6b

Runs in the worker: `run` takes a resolved config and a run directory and returns what goes into result.json.
"""

from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from llmkit.config import TrainConfig
from llmkit.data.prepare import prepare_data
from llmkit.model.loading import load_model, load_tokenizer
from llmkit.model.methods import apply_method, cast_trained, loading_dtype
from llmkit.training.arguments import total_steps, training_arguments
from llmkit.training.checkpoints import PARTIAL
from llmkit.training.console import RunConsole
from llmkit.training.facts import (
    check_disk,
    complete_config,
    learn_to_stop,
    settle_gradient_checkpointing,
    state_facts,
    warn_of_size,
)
from llmkit.training.session import Session
from llmkit.training.stopping import StopRequest
from llmkit.training.trainer import RunMixin


class Trainer(RunMixin, SFTTrainer):
    """TRL's SFT trainer with llmkit's checkpoints and its stop at the first non-finite value."""


def run(config: TrainConfig, run_dir: Path, console: RunConsole, stop: StopRequest) -> dict[str, Any]:
    """Fine-tune as `config` says; returns the contents of result.json. Raises LlmkitError for the user to read."""
    device, precision, max_length = complete_config(config, run_dir)
    set_seed(config.seed)  # adapters start from random numbers, before the trainer would seed them

    # Data comes before weights: its errors should not wait for a large model to load.
    tokenizer = load_tokenizer(config.model, config.data.chat_template or config.model.chat_template)
    data = prepare_data(config.data, tokenizer, max_length=max_length)

    warn_of_size(config, precision, device, console)
    dtype = loading_dtype(config, precision)
    model: Any = load_model(config.model, dtype=dtype, device=device, quantization=config.qlora, precision=precision)
    learn_to_stop(model, tokenizer, data.train, console)
    model = apply_method(model, config, precision)
    settle_gradient_checkpointing(config, model, run_dir)
    state_facts(config, model, data, console, device=device, precision=precision)
    check_disk(config, model, run_dir)

    arguments = training_arguments(
        config,
        output_dir=run_dir / "checkpoints" / PARTIAL,
        precision=precision,
        device=device,
        steps=total_steps(config.training, len(data.train)),
    )
    trainer = Trainer(
        run_dir=run_dir,
        model=model,
        args=SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=data.train.dataset,
        eval_dataset=data.validation.dataset if data.validation else None,
        processing_class=tokenizer,
    )
    # TRL turns the adapter of a quantized model to bfloat16, where small updates vanish and resuming is not exact.
    cast_trained(model, precision.trained)

    with Session(config, run_dir, trainer, data, tokenizer, console, stop, autocast=precision.autocast) as session:
        session.measure_base()
        session.train()
        session.measure_result()
        return session.deliver()
