"""What only the training machine knows: completed in the config, and stated before training, one fact a line."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmkit.config import TrainConfig
from llmkit.config.resolve import device_count
from llmkit.data.prepare import PreparedData, Split
from llmkit.errors import ConfigError
from llmkit.model.adapters import ADAPTER
from llmkit.model.context import settle_lengths
from llmkit.model.loading import cached_commit, load_model_config, shown_source
from llmkit.model.methods import count_parameters, loading_dtype
from llmkit.model.precision import Precision, resolve_device, resolve_precision
from llmkit.serving.servable import warning_at_training
from llmkit.training.arguments import CHECKPOINTING_FROM_PARAMETERS, steps_per_pass, total_steps
from llmkit.training.checkpoints.manifest import committed
from llmkit.training.console import RunConsole
from llmkit.training.memory import GIB, capacity, in_units, optimizer_state


def complete_config(config: TrainConfig) -> tuple[torch.device, Precision]:
    """Fill in what was left to this machine and to the model's own config.

    Returns the device and the precision.
    """
    device = resolve_device(config.hardware)
    precision = resolve_precision(config.precision.name, device)
    load_model_config(config.model)  # brings it into the cache, which then knows the commit
    settle_lengths(config)
    for key, value in {"precision.name": precision.name, "hardware.device": device.type}.items():
        node, _, name = key.partition(".")
        holder = getattr(config, node)
        if getattr(holder, name) in (None, "auto"):
            setattr(holder, name, value)
            config.derived.append(key)
    config.model.commit = cached_commit(config.model)
    return device, precision


def warn_of_size(config: TrainConfig, precision: Precision, device: torch.device, console: RunConsole) -> None:
    """Say that the weights alone do not fit, where their number is known, before they are downloaded and loaded."""
    bits = config.qlora.bits if config.qlora is not None else 8 * loading_dtype(config, precision).itemsize
    needed = (config.model.parameters or 0) * bits / 8 / GIB
    if needed > (available := capacity(config, device) / GIB):
        console.warn(
            f"the weights of {config.model.name} need {needed:.0f} GiB and {device_name(device)} has {available:.0f}: "
            "method=qlora needs a quarter of 16-bit weights, or choose a smaller model."
        )


def settle_gradient_checkpointing(config: TrainConfig, model: nn.Module) -> None:
    """Where it is left open: on for large models, whose size is known only now."""
    if config.training.gradient_checkpointing is None:
        config.training.gradient_checkpointing = count_parameters(model)[1] >= CHECKPOINTING_FROM_PARAMETERS
        config.derived.append("training.gradient_checkpointing")


def learn_to_stop(model: Any, tokenizer: PreTrainedTokenizerBase, train: Split) -> None:
    """Generation ends where answers end: the tokens that close them join generation_config's end tokens."""
    own = model.generation_config.eos_token_id
    known = [] if own is None else [own] if isinstance(own, int) else list(own)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    closing = sorted(train.end_tokens & special)
    model.generation_config.eos_token_id = list(dict.fromkeys([*closing, *known])) or None
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def state_facts(
    config: TrainConfig,
    model: nn.Module,
    data: PreparedData,
    console: RunConsole,
    *,
    device: torch.device,
    precision: Precision,
    new_tokens: int,
) -> None:
    """One line per fact, as things really are, not as they were asked for."""
    trainable, total = count_parameters(model)
    source = shown_source(config.model)
    commit = f" at {config.model.commit[:8]}" if config.model.commit else ""
    console.fact("model", f"{config.model.name} ({source}{commit})")
    console.fact(
        "trained", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}) with method={config.method.name}"
    )
    settings: Any = getattr(model, "peft_config", {})
    if settings and (warning := warning_at_training(settings[ADAPTER].to_dict())):
        console.warn(warning)
    if new_tokens:
        console.fact("new tokens", f"{new_tokens} rows, started as {config.data.special_tokens_init}")
    train, held_out = data.train, data.validation
    if config.recipe == "dpo":
        counted = f"{len(train):,} pairs, {train.supervised_tokens:,} tokens in their answers"
    else:
        counted = f"{len(train):,} examples, {train.tokens:,} tokens, of which {train.supervised_tokens:,} are learnt "
        counted += f"({train.supervised_tokens / train.tokens:.0%})"
    console.fact("data", f"{counted}; longest {train.longest:,} tokens of at most {config.data.max_length:,}")
    console.fact(
        "held out",
        f"{len(held_out):,} example{'s' if len(held_out) > 1 else ''}"
        if held_out
        else "none: the loss on unseen data stays unknown",
    )
    if data.test:
        console.fact("test", f"{len(data.test):,} examples, measured at the end")
    training = config.training
    rows = len(train.dataset)
    steps = total_steps(training, rows)
    batch = f"{training.per_device_train_batch_size} at a time x {training.gradient_accumulation_steps}"
    processes = device_count(config)
    batch += f" x {processes} processes" if processes > 1 else ""
    console.fact(
        "steps",
        f"{steps:,} of {training.global_batch_size} {'examples' if rows == len(train) else 'sequences'} ({batch}), "
        f"about {steps / steps_per_pass(training, rows):.1f} passes; learning rate {training.learning_rate:g}, "
        f"{training.lr_scheduler_type}; gradient checkpointing {'on' if training.gradient_checkpointing else 'off'}",
    )
    each = f"{processes} x " if processes > 1 else ""
    console.fact("device", f"{each}{device_name(device)}, {_dtypes(model, precision)}, attention {attention(model)}")
    _state_memory(config, model, console, device)


def check_disk(config: TrainConfig, model: nn.Module, run_dir: Path, console: RunConsole) -> None:
    """Compare what will be saved with the free disk, before the first step.

    The result must fit, and the checkpoints that `training.save_steps` asks for; those that are only a safeguard
    (`checkpoint.minutes`) are warned of. Raises ConfigError with the numbers.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if config.lora is not None else list(model.parameters())
    result = sum(p.numel() * p.element_size() for p in saved)
    checkpoint = sum(p.numel() * p.element_size() for p in trained) + optimizer_state(config.training.optim, trained)
    # One more than are kept, while it is written.
    more = max(config.checkpoint.keep + 1 - len(committed(run_dir)), 1)
    free = shutil.disk_usage(run_dir).free
    if result > free:
        raise ConfigError(
            f"{run_dir}: the trained weights need {in_units(result)} and the disk has {in_units(free)} free; "
            "make room, or choose run_dir= on another disk."
        )
    regular = config.training.save_steps is not None
    if (regular or config.checkpoint.minutes is not None) and result + more * checkpoint > free:
        said = (
            f"{run_dir}: a checkpoint needs {in_units(checkpoint)}, {more} of them (checkpoint.keep="
            f"{config.checkpoint.keep}, and the one being written) with the result "
            f"{in_units(result + more * checkpoint)}; the disk has {in_units(free)} free. Make room, keep fewer, or "
            "choose run_dir= on another disk."
        )
        if regular:
            raise ConfigError(said)
        console.warn(f"{said} Training goes on; a checkpoint that cannot be written will say so.")


def _dtypes(model: nn.Module, precision: Precision) -> str:
    def names(trained: bool) -> str:
        kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad == trained}
        return "/".join(sorted(kinds))

    frozen = f", frozen weights {names(False)}" if names(False) else ""
    arithmetic = str(precision.autocast).removeprefix("torch.") + " arithmetic, " if precision.autocast else ""
    return f"{arithmetic}trained weights {names(True)}{frozen}"


def attention(model: nn.Module) -> str:
    """The attention implementation in use."""
    return str(getattr(model.config, "_attn_implementation", "unknown"))


def device_name(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3`, or `CPU (2 threads)`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _state_memory(config: TrainConfig, model: nn.Module, console: RunConsole, device: torch.device) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    needed = sum(p.numel() * p.element_size() for p in (*model.parameters(), *trained))  # weights and gradients
    needed += optimizer_state(config.training.optim, trained)
    available = capacity(config, device)
    there = in_units(available)
    console.fact("memory", f"{in_units(needed)} for weights, gradients and optimizer, plus activations; {there} there")
    if needed > 0.9 * available:
        console.warn(
            f"that leaves too little of {there} for activations: method=lora or qlora, precision=bf16_pure "
            "or deepspeed=zero3_offload need less."
        )
