"""Which parameters are trained: full, freeze, lora, qlora."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.config.init_from import adapter_directory
from llmkit.config.schema import FreezeConfig, TrainConfig
from llmkit.errors import ConfigError
from llmkit.model.adapters import add_adapter, continue_adapter
from llmkit.model.precision import Precision
from llmkit.model.structure import decoder_layers, token_matrices

TRAINED_ROWS = "llmkit_trained_rows"  # attribute of a parameter of which only some rows are trained: how many


def loading_dtype(config: TrainConfig, precision: Precision) -> torch.dtype:
    """The dtype to load weights in: that of trained weights if all are trained, else that of frozen ones."""
    return precision.trained if config.method.name == "full" else precision.frozen


def apply_method(
    model: PreTrainedModel, config: TrainConfig, precision: Precision, *, new_rows: Sequence[int] = ()
) -> nn.Module:
    """Mark what is trained, in the dtype that training needs; wraps the model for lora and qlora.

    With `init_from` an adapter, that one is continued. Full training moves all rows of new tokens anyway; the other
    methods train just these of the embeddings and the head, whatever else they leave alone.

    Args:
        new_rows: the rows of tokens that are new to the model, as `fit_embeddings` returns them.

    Raises ConfigError if the settings select nothing.
    """
    trained: nn.Module = model
    if config.method.name == "full":
        model.requires_grad_(True)
    elif config.method.name == "freeze":
        freeze(model, config.freeze)
        if new_rows:
            train_rows(model, new_rows, weight_decay=config.training.weight_decay)
    elif adapter := adapter_directory(config):
        trained = continue_adapter(model, adapter, quantized=config.qlora is not None, new_rows=new_rows)
    else:
        trained = add_adapter(model, config.lora, quantized=config.qlora is not None, new_rows=new_rows)
    cast_trained(trained, precision.trained)
    return trained


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the trained parameters to `dtype`; the frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def trained_weights_kept(model: nn.Module) -> Iterator[None]:
    """Put the adapter of a quantized model back at the end as it was at the beginning, dtype included.

    Around making a TRL trainer, which rounds it to bfloat16 (trl 1.16): there small updates vanish, resuming is not
    exact, and an adapter that is continued would not start as it was.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and quantized]
    before = [parameter.detach().clone() for parameter in trained]
    yield
    for parameter, value in zip(trained, before, strict=True):
        parameter.data = value


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


def train_rows(model: PreTrainedModel, rows: Sequence[int], *, weight_decay: float) -> None:
    """Train `rows` of the token matrices, where these are frozen, and no other row of them.

    Raises ConfigError with a weight decay, which would shrink the other rows although their gradient is zero.
    """
    frozen = [matrix for matrix in token_matrices(model) if not matrix.requires_grad]
    if frozen and weight_decay:
        raise ConfigError(
            f"training.weight_decay={weight_decay:g} with method=freeze and new tokens: the decay would move the rows "
            "of all other tokens too. Use training.weight_decay=0, or train all rows: freeze.embeddings=true "
            "freeze.head=true."
        )

    def keep(gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        kept[list(rows)] = gradient[list(rows)]
        return kept

    for matrix in frozen:
        matrix.requires_grad_(True)
        matrix.register_hook(keep)
        setattr(matrix, TRAINED_ROWS, len(rows))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        rows = getattr(parameter, TRAINED_ROWS, None)
        if parameter.requires_grad:
            trainable += count if rows is None else rows * (count // len(parameter))
    return trainable, total
