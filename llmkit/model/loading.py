"""The model's config and weights, through the ordinary Transformers calls.

Whatever goes wrong there ends in one message that says what to do.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llmkit.config.schema import ModelConfig, QloraConfig, TrainConfig
from llmkit.errors import ConfigError
from llmkit.model.context import load_model_config
from llmkit.model.new_rows import add_rows
from llmkit.model.precision import Precision
from llmkit.model.source import cached_commit, explained, hub_arguments, model_source, shown_source
from llmkit.model.structure import token_matrices
from llmkit.model.tokenizer import load_original_tokenizer, load_tokenizer

__all__ = [
    "cached_commit",
    "fit_embeddings",
    "keep_weights_unpacked",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "model_source",
    "quantization_config",
    "shown_source",
]


def load_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QloraConfig | None,
    precision: Precision,
) -> PreTrainedModel:
    """The model on `device`, its weights in `dtype`, or quantized as asked. Only safetensors are read.

    Raises ConfigError with what to do if it cannot be had, and if weights are missing from it.
    """
    arguments: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if config.attn_implementation != "auto":
        arguments["attn_implementation"] = config.attn_implementation
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, precision)
    if quantization is not None or device.type == "cuda":
        arguments["device_map"] = {"": device}
    source = model_source(config, weights=True)
    if config.path and not list(Path(source).glob("*.safetensors")):
        raise ConfigError(_no_weights(Path(config.path)))
    # Transformers would send the user's token to a service that converts pickled weights, and load what that made.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    with explained(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **hub_arguments(config), **arguments)
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"{shown_source(config)}: {len(missing)} weights are missing from its files (first: {missing[0]}); "
            "they would start random."
        )
    if quantization is not None and quantization.bits == 4:
        keep_weights_unpacked(model)
    return model


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> list[int]:
    """Give the tokens that are new to the model their rows, started as `data.special_tokens_init` says.

    Returns the numbers of the rows, for `apply_method` to train.
    """
    original = load_original_tokenizer(config.model)
    present = len(token_matrices(model)[0])
    rows = add_rows(model, tokenizer, original, init=config.data.special_tokens_init, seed=config.seed)
    if config.lora is not None and rows and rows[-1] >= max(present, len(tokenizer)):
        raise ConfigError(
            f"model={config.model.name}: the ids of its tokens have gaps, so that no library would find the new rows "
            "beside an adapter; use method=full, or data.chat_template=plain, which needs no new tokens."
        )
    return rows


def keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference at the first forward in evaluation mode.

    On CPUs with AVX512-BF16 it does so in place and for good; training after an evaluation then gets gradients of 0.15
    times their size, in other directions, through every frozen layer (seen with bitsandbytes 0.50.2).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization_config(quantization: QloraConfig, precision: Precision) -> Any:
    """bitsandbytes' config for the frozen base."""
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=precision.autocast or precision.frozen,
    )


def _no_weights(directory: Path) -> str:
    pickled = [path.name for path in directory.glob("*.bin")]
    if pickled:
        return (
            f"model.path={directory}: has {pickled[0]} but no .safetensors; pickled weights can run code when loaded, "
            "so llmkit reads safetensors only. Convert it with save_pretrained."
        )
    return f"model.path={directory}: no weights there (*.safetensors)."
