"""Which parameters are trained: full, freeze, lora, qlora."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.config.schema import FreezeConfig, LoraConfig, TrainConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.model.precision import Precision

NEED_A_PASS_OVER_DATA = ("eva", "corda", "lora_ga")  # values of lora.init_lora_weights


def loading_dtype(config: TrainConfig, precision: Precision) -> torch.dtype:
    """The dtype to load weights in: that of trained weights if all are trained, else that of frozen ones."""
    return precision.trained if config.method.name == "full" else precision.frozen


def apply_method(model: PreTrainedModel, config: TrainConfig, precision: Precision) -> nn.Module:
    """Mark what is trained, in the dtype that training needs; wraps the model for lora and qlora.

    Raises ConfigError if the settings select nothing.
    """
    trained: nn.Module = model
    if config.method.name == "full":
        model.requires_grad_(True)
    elif config.method.name == "freeze":
        freeze(model, config.freeze)
    else:
        trained = add_adapter(model, config.lora, quantized=config.qlora is not None)
    cast_trained(trained, precision.trained)
    return trained


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
    """The stack of decoder layers: the first ModuleList as long as the config says (experts are lists too).

    Raises ConfigError for a model without one.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(
        f"{type(model).__name__} has no list of its {count} layers: choose by name, with freeze.patterns or "
        "lora.target_modules."
    )


def add_adapter(model: PreTrainedModel, settings: LoraConfig, *, quantized: bool) -> nn.Module:
    """Wrap the model with PEFT's LoRA; the base is frozen."""
    import peft

    _check_adapter(model, settings)
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.requires_grad_(False)
    try:
        return peft.get_peft_model(model, peft_config(settings, model))
    except (ValueError, TypeError, ImportError) as error:  # what PEFT raises for options that do not go together
        raise ConfigError(f"lora: {' '.join(str(error).split())}") from error


def peft_config(settings: LoraConfig, model: PreTrainedModel) -> Any:
    """PEFT's config for our `lora` node; the names are the same."""
    import peft

    targets = settings.target_modules
    if targets == "all-linear" and settings.layers_to_transform:
        targets = linear_names(decoder_layers(model))  # PEFT refuses its own word for them together with layers
    assert settings.lora_alpha is not None, "resolve() fills it in"
    bias: Any = settings.bias
    return peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        modules_to_save=settings.modules_to_save,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
        bias=bias,
        layers_to_transform=settings.layers_to_transform or None,
        task_type="CAUSAL_LM",
    )


def linear_names(model: nn.Module) -> list[str]:
    """The last words of the names of linear modules: q_proj, k_proj, ..."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def _check_adapter(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Raises ConfigError where PEFT would be silent: a name without a module, no such layer, a start it cannot make."""
    if settings.init_lora_weights in NEED_A_PASS_OVER_DATA:
        raise ConfigError(
            f"lora.init_lora_weights={settings.init_lora_weights} needs a pass over the data before training, which "
            "llmkit does not make; true, gaussian, pissa and olora need none."
        )
    modules = dict(model.named_modules())
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), "")
    wanted = [] if settings.target_modules == "all-linear" else list(settings.target_modules)
    if head and head.rpartition(".")[2] in wanted:
        # TRL computes the loss from the head's weight directly, past an adapter on it.
        raise ConfigError(f"lora.target_modules: {head} cannot carry an adapter; put it into lora.modules_to_save.")
    linear = [name for name in linear_names(model) if name != head.rpartition(".")[2]]
    every = sorted({name.rpartition(".")[2] for name in modules} - {""})
    for key, choices, known in (
        ("target_modules", wanted, linear),
        ("modules_to_save", settings.modules_to_save or [], [word for word in every if not word.isdecimal()]),
    ):
        for choice in choices:
            if not any(name == choice or name.endswith(f".{choice}") for name in modules):
                raise ConfigError(
                    f"lora.{key}={choice}: matches no module of {type(model).__name__}.{did_you_mean(choice, known)} "
                    f"Its {'linear ' if known is linear else ''}modules: {', '.join(known)}."
                )
    if layers := settings.layers_to_transform:
        count = len(decoder_layers(model))
        if not all(0 <= layer < count for layer in layers):
            raise ConfigError(f"lora.layers_to_transform={layers}: the model has {count} layers, 0 to {count - 1}.")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
