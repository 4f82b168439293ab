"""Which parameters are trained: full, freeze, lora, qlora."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.config.schema import FreezeConfig, LoraConfig, TrainConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.model.precision import Precision


def loading_dtype(config: TrainConfig, precision: Precision) -> torch.dtype:
    """The dtype to load weights in: that of trained weights if all are trained, else that of frozen ones."""
    return precision.trained if config.method.name == "full" else precision.frozen


def apply_method(model: PreTrainedModel, config: TrainConfig, precision: Precision) -> nn.Module:
    """Mark what is trained, in the dtype that training needs; wraps the model for lora and qlora.

    Raises ConfigError if the settings select nothing.
    """
    if config.method.name == "full":
        model.requires_grad_(True)
    elif config.method.name == "freeze":
        freeze(model, config.freeze)
    else:
        model = add_adapter(model, config.lora, quantized=config.qlora is not None)
    cast_trained(model, precision.trained)
    return model


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the trained parameters to `dtype`; the frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def freeze(model: PreTrainedModel, settings: FreezeConfig) -> None:
    """Train only the last layers, the embeddings or head if asked, and parameters whose name matches a pattern."""
    layers = decoder_layers(model)
    if settings.last_n_layers > len(layers):
        raise ConfigError(f"freeze.last_n_layers={settings.last_n_layers}: the model has {len(layers)} layers.")
    model.requires_grad_(False)
    for layer in layers[len(layers) - settings.last_n_layers :]:
        layer.requires_grad_(True)
    if settings.embeddings:
        model.get_input_embeddings().requires_grad_(True)
    if settings.head:
        model.get_output_embeddings().requires_grad_(True)
    for pattern in settings.patterns:
        try:
            matching = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"freeze.patterns: '{pattern}' is not a regular expression: {error}.") from error
        if not matching:
            example = next(name for name, _ in model.named_parameters())
            raise ConfigError(f"freeze.patterns: '{pattern}' matches no parameter (names look like {example}).")
        for parameter in matching:
            parameter.requires_grad_(True)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers: the longest ModuleList of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"method=freeze: {type(model).__name__} has no list of layers; use freeze.patterns.")
    return max(lists, key=len)


def add_adapter(model: PreTrainedModel, settings: LoraConfig, *, quantized: bool) -> nn.Module:
    """Wrap the model with PEFT's LoRA; the base is frozen."""
    import peft

    _check_targets(model, settings)
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.requires_grad_(False)
    try:
        return peft.get_peft_model(model, peft_config(settings, model))
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from error


def peft_config(settings: LoraConfig, model: PreTrainedModel) -> Any:
    """PEFT's config for our `lora` node; the names are the same."""
    import peft

    targets = settings.target_modules
    if targets == "all-linear" and settings.layers_to_transform:
        targets = linear_names(decoder_layers(model))  # PEFT refuses its own word for them together with layers
    return peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        modules_to_save=settings.modules_to_save,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
        bias=settings.bias,
        layers_to_transform=settings.layers_to_transform,
        task_type="CAUSAL_LM",
    )


def linear_names(model: nn.Module) -> list[str]:
    """The last words of the names of linear modules: q_proj, k_proj, ..."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def _check_targets(model: nn.Module, settings: LoraConfig) -> None:
    """Every name must match a module: PEFT is silent about one that matches none beside others that do."""
    names = [name for name, _ in model.named_modules()]
    linear = linear_names(model)
    wanted = [] if settings.target_modules == "all-linear" else list(settings.target_modules)
    if "lm_head" in wanted:
        # TRL computes the loss from lm_head.weight directly, past an adapter on it.
        raise ConfigError("lora.target_modules: lm_head cannot carry an adapter; put it into lora.modules_to_save.")
    for key, choices in (("target_modules", wanted), ("modules_to_save", settings.modules_to_save or [])):
        for choice in choices:
            if not any(name == choice or name.endswith(f".{choice}") for name in names):
                raise ConfigError(
                    f"lora.{key}={choice}: matches no module of {type(model).__name__}.{did_you_mean(choice, linear)} "
                    f"Its linear modules: {', '.join(linear)}."
                )
    layers = settings.layers_to_transform
    if layers and max(layers) >= len(decoder_layers(model)):
        raise ConfigError(f"lora.layers_to_transform={layers}: the model has {len(decoder_layers(model))} layers.")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
