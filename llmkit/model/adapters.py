"""LoRA adapters through PEFT: a new one, or one that is continued, with the rows of new tokens where there are any."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from llmkit.config.schema import LoraConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.model.structure import decoder_layers, linear_names, token_modules

ADAPTER = "default"  # PEFT's name of the adapter that is trained
NEED_A_PASS_OVER_DATA = ("eva", "corda", "lora_ga")  # values of lora.init_lora_weights


def add_adapter(
    model: PreTrainedModel, settings: LoraConfig, *, quantized: bool, new_rows: Sequence[int] = ()
) -> nn.Module:
    """Wrap the model with PEFT's LoRA; the base is frozen, but for the rows of new tokens."""
    _check_adapter(model, settings)
    tokens = token_indices(model, settings, new_rows) if new_rows else None
    model = _frozen(model, quantized=quantized)
    try:
        return _ready_for_trl(peft.get_peft_model(model, peft_config(settings, model, tokens)))
    except (ValueError, TypeError, ImportError) as error:  # what PEFT raises for options that do not go together
        raise ConfigError(f"lora: {' '.join(str(error).split())}") from error


def continue_adapter(
    model: PreTrainedModel, directory: Path, *, quantized: bool, new_rows: Sequence[int] = ()
) -> nn.Module:
    """Wrap the model with the adapter in `directory`, to be trained on.

    Raises ConfigError if the adapter cannot be loaded, or does not hold the `new_rows` of the base's matrices.
    """
    settings: Any = peft.PeftConfig.from_pretrained(str(directory))
    if not _holds(settings, model, new_rows):
        raise ConfigError(
            f"init_from={directory}: this run has new tokens that the adapter does not hold, and none can be added to "
            "one. Use the template and tokens it was trained with, or merge it into its base first (its README.md says "
            "how) and start from that."
        )
    model = _frozen(model, quantized=quantized)
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(directory), is_trainable=True)
    except (ValueError, TypeError, IndexError, ImportError, RuntimeError, OSError, SafetensorError) as error:
        raise ConfigError(f"init_from={directory}: {' '.join(str(error).split())[:300]}") from error
    for wrapper in wrapped.modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            # The rows stand in the base too: a second adapter, TRL's reference in DPO, takes its rows from there.
            layer: Any = wrapper.token_adapter
            base = layer.get_base_layer().weight.data
            base[layer.token_indices[ADAPTER]] = layer.trainable_tokens_delta[ADAPTER].detach().to(base)
    return _ready_for_trl(wrapped)


def _holds(settings: Any, model: PreTrainedModel, rows: Sequence[int]) -> bool:
    """Whether an adapter of these settings brings the rows of all matrices that have a row per token."""
    held = settings.trainable_token_indices or {}
    if isinstance(held, list):  # PEFT's short form, for the input embeddings alone
        held = {token_modules(model)[0]: held}
    return all(
        _names(settings.modules_to_save or (), name)
        or set(rows) <= {row for key, found in held.items() if _names([key], name) for row in found}
        for name in token_modules(model)
    )


def _frozen(model: PreTrainedModel, *, quantized: bool) -> PreTrainedModel:
    if quantized:
        prepared: Any = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return prepared
    model.requires_grad_(False)
    return model


def _ready_for_trl(model: Any) -> nn.Module:
    """Mend two places where PEFT 0.21 and TRL 1.16 do not meet once rows of new tokens are trained."""
    mend_head(model)
    # A checkpoint's adapter would bring a copy of whole matrices that have grown, and ask the hub how large they were.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def mend_head(model: Any) -> None:
    """TRL's loss reads the head's weight and bias; PEFT's wrapper of new rows answers for the weight alone."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        wrapper: Any = head
        wrapper.bias = None


def token_indices(model: PreTrainedModel, settings: LoraConfig, rows: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: `rows` in every module that has a row per token and is not trained whole.

    Raises ConfigError where PEFT could not train them, or would lose something else.
    """
    names, kind = token_modules(model), type(model).__name__
    tied = len(names) == 1
    whole = [name for name in names if _names(settings.modules_to_save or (), name)]
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None and (tied or names[-1] not in whole):
        instead = "" if tied else f"lora.modules_to_save=[{names[-1]}], "
        raise ConfigError(
            f"method=lora with new tokens: the output head of {kind} has a bias, which PEFT leaves out where it trains "
            f"single rows; use {instead}method=full, or data.chat_template=plain, which needs no new tokens."
        )
    if tied and {"lm_head", *names} & set(settings.modules_to_save or ()):
        raise ConfigError(
            f"lora.modules_to_save={settings.modules_to_save} with new tokens: the head of {kind} is its embeddings, "
            "and would be torn from them. Leave it out: the rows of the new tokens are trained without it."
        )
    targets = settings.target_modules
    if targets != "all-linear" and any(_names(targets, name) for name in names):
        raise ConfigError(
            f"lora.target_modules={targets} with new tokens: an adapter on {' or '.join(names)} does not go together "
            "with training single rows there; leave it out, or name it in lora.modules_to_save."
        )
    return {name: list(rows) for name in names if name not in whole}


def _names(words: Sequence[str], module: str) -> bool:
    """Whether PEFT takes one of the words for the module of that name."""
    return any(module == word or module.endswith(f".{word}") for word in words)


def peft_config(settings: LoraConfig, model: PreTrainedModel, tokens: dict[str, list[int]] | None = None) -> Any:
    """PEFT's config for our `lora` node; the names are the same. `tokens`: see `token_indices`."""
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
        trainable_token_indices=tokens or None,
        task_type="CAUSAL_LM",
    )


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
