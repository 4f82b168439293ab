"""What every recipe starts from: data that is proven right, then the model with its method, and the facts stated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llmkit import config as configuration
from llmkit.config import TrainConfig
from llmkit.data.prepare import PreparedData
from llmkit.data.reading.sources import listed_tokens, open_training_sources
from llmkit.model.fingerprint import start_fingerprint
from llmkit.model.loading import fit_embeddings, load_model
from llmkit.model.methods import apply_method, loading_dtype
from llmkit.model.tokenizer import load_run_tokenizer, may_add_tokens
from llmkit.training.arguments import total_steps, training_arguments
from llmkit.training.checkpoints.manifest import PARTIAL
from llmkit.training.checkpoints.origin import bring_checkpoint, bring_to_machine
from llmkit.training.console import RunConsole
from llmkit.training.facts import (
    check_disk,
    complete_config,
    learn_to_stop,
    settle_gradient_checkpointing,
    state_facts,
    warn_of_size,
)
from llmkit.training.pack.pack import shared_or_own
from llmkit.training.ranks import agree, first_of_machine, is_main, on_main
from llmkit.training.resuming import check_data, check_processes, check_start
from llmkit.training.run_data import prepare_run_data
from llmkit.training.stopping import StopRequest


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model and its data, ready for a trainer; `arguments` are those of Transformers' TrainingArguments."""

    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    model: Any
    arguments: dict[str, Any]
    autocast: torch.dtype | None
    checkpoint: Path | None  # what the run goes on from
    start: str  # a fingerprint of the weights it began with


def make_ready(
    config: TrainConfig, run_dir: Path, console: RunConsole, stop: StopRequest, *, preference: bool = False
) -> Ready:
    """Complete the config, prepare the data, load the model and apply the method, in this order.

    Raises LlmkitError for the user to read.
    """
    checkpoint = on_main(lambda: bring_checkpoint(config, run_dir, console))
    agree(config)  # with what the checkpoint was made with
    if checkpoint is not None:
        check_processes(config, checkpoint)
        first_of_machine(lambda: bring_to_machine(checkpoint, config, run_dir, console))
    device, precision = first_of_machine(lambda: complete_config(config))
    agree(config)
    save_config(config, run_dir)

    # Data comes before weights: its errors should not wait for a large model to load.
    def prepare() -> tuple[list[str], PreTrainedTokenizerBase, PreparedData]:
        opened = open_training_sources(config.data, preference=preference)
        beside = listed_tokens(opened)
        tokenizer = load_run_tokenizer(config, beside)
        data = prepare_run_data(config, tokenizer, run_dir, console, stop, opened=opened, preference=preference)
        return beside, tokenizer, data

    beside, tokenizer, data = first_of_machine(prepare)
    agree(config)
    save_config(config, run_dir)

    if checkpoint is not None:
        check_data(config, run_dir, checkpoint, data.fingerprint)

    warn_of_size(config, precision, device, console)
    dtype = loading_dtype(config, precision)
    host = torch.device("cpu") if loads_on_host(config) else device

    def load() -> tuple[PreTrainedModel, list[int]]:
        model = load_model(config.model, dtype=dtype, device=host, quantization=config.qlora, precision=precision)
        return model, fit_embeddings(model, tokenizer, config) if may_add_tokens(config, beside) else []

    base, new_rows = shared_or_own(load)
    start = start_fingerprint(config)
    if checkpoint is not None:
        check_start(config, run_dir, checkpoint, start)
    learn_to_stop(base, tokenizer, data.train)
    set_seed(config.seed)  # adapters start from random numbers, before the trainer would seed them
    model = apply_method(base, config, precision, new_rows=new_rows)
    settle_gradient_checkpointing(config, model)
    save_config(config, run_dir)
    state_facts(config, model, data, console, device=device, precision=precision, new_tokens=len(new_rows))
    check_disk(config, model, run_dir, console)
    arguments = training_arguments(
        config,
        output_dir=run_dir / "checkpoints" / PARTIAL,
        precision=precision,
        device=device,
        steps=total_steps(config.training, len(data.train.dataset)),
    )
    return Ready(
        tokenizer=tokenizer,
        data=data,
        model=model,
        arguments=arguments,
        autocast=precision.autocast,
        checkpoint=checkpoint,
        start=start,
    )


def loads_on_host(config: TrainConfig) -> bool:
    """Whether an engine takes the weights from the host's memory, a part to each device, which need not hold them all.

    DPO measures the policy at its start before there is an engine, on the device.
    """
    return config.recipe == "sft" and (config.deepspeed.stage == 3 or config.distributed.name == "fsdp2")


def save_config(config: TrainConfig, run_dir: Path) -> None:
    """Write config.yaml as it has become."""
    if is_main():
        configuration.save(config, run_dir)
