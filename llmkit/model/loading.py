"""Tokenizer and model, from the hub, its cache or a directory, through the ordinary Transformers calls.

Whatever goes wrong there ends in one message that says what to do.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmkit.config.schema import ModelConfig, QloraConfig
from llmkit.data.templates import read_template
from llmkit.errors import ConfigError
from llmkit.model.precision import Precision


def model_source(config: ModelConfig) -> str:
    """What `from_pretrained` is given: a directory or a hub id. Builds the tiny model on first use."""
    if config.path:
        return config.path
    if config.hub_id:
        return config.hub_id
    from llmkit.model.tiny import tiny_model

    return str(tiny_model())


def load_model_config(config: ModelConfig) -> Any:
    """The model's own config (Transformers' object)."""
    with _explained(config):
        return AutoConfig.from_pretrained(model_source(config), **_hub_arguments(config))


def cached_commit(config: ModelConfig) -> str | None:
    """The commit that the hub model's revision stands for in the local cache, once its config has been loaded."""
    from huggingface_hub import try_to_load_from_cache

    if config.path or not config.hub_id:
        return None
    cached = try_to_load_from_cache(config.hub_id, "config.json", revision=config.commit or config.revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def load_tokenizer(config: ModelConfig, chat_template: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with its padding token and the chat template that training, evaluation and serving share."""
    with _explained(config):
        tokenizer = AutoTokenizer.from_pretrained(model_source(config), **_hub_arguments(config))
    if not tokenizer.is_fast:  # only these say which characters a token stands for, and so which tokens are answers
        raise ConfigError(f"model={config.name}: {model_source(config)} has no fast tokenizer (tokenizer.json).")
    set_pad_token(tokenizer, config.pad_token)
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def set_pad_token(tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
    """Give the tokenizer a padding token. Padding is masked by position, so sharing one hides nothing from training.

    Raises ConfigError if the chosen token is not in the vocabulary.
    """
    if choice == "auto":
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ConfigError(
                "model.pad_token=auto: this tokenizer has no pad, unk or eos token; name one that it has."
            )
    elif choice in ("unk", "bos", "eos"):
        token = getattr(tokenizer, f"{choice}_token")
        if token is None:
            raise ConfigError(f"model.pad_token={choice}: this tokenizer has no {choice} token; use auto.")
        tokenizer.pad_token = token
    elif choice in tokenizer.get_vocab():
        tokenizer.pad_token = choice
    else:
        raise ConfigError(
            f"model.pad_token={choice}: not in the vocabulary; use auto, unk, bos, eos or an existing token."
        )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
    """Put the chosen template on the tokenizer, where saving takes it along.

    Raises ConfigError if there is none, or if the template writes markers that are not tokens of this model.
    """
    if choice == "keep-original":
        if not tokenizer.chat_template:
            raise ConfigError(
                "This model has no chat template: choose one with data.chat_template=plain (ordinary text, for base "
                "models) or a Jinja file."
            )
        return
    tokenizer.chat_template = read_template(choice)
    if choice == "plain" and tokenizer.eos_token is None:
        raise ConfigError("data.chat_template=plain: this tokenizer has no eos token to end answers with.")
    if choice == "chat-ml":
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
        if missing:
            raise ConfigError(
                f"data.chat_template=chat-ml: {' and '.join(missing)} are not tokens of this model; "
                "data.chat_template=plain needs no new tokens."
            )


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
    if config.path and not list(Path(config.path).glob("*.safetensors")):
        raise ConfigError(_no_weights(Path(config.path)))
    # Transformers would send the user's token to a service that converts pickled weights, and load what that made.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    with _explained(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(model_source(config), **_hub_arguments(config), **arguments)
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"{model_source(config)}: {len(missing)} weights are missing from its files (first: {missing[0]}); "
            "they would start random."
        )
    if quantization is not None and quantization.bits == 4:
        keep_weights_unpacked(model)
    return model


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


def _hub_arguments(config: ModelConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.hub_id and not config.path:
        arguments["revision"] = config.commit or config.revision
    return arguments


def _no_weights(directory: Path) -> str:
    pickled = [path.name for path in directory.glob("*.bin")]
    if pickled:
        return (
            f"model.path={directory}: has {pickled[0]} but no .safetensors; pickled weights can run code when loaded, "
            "so llmkit reads safetensors only. Convert it with save_pretrained."
        )
    return f"model.path={directory}: no weights there (*.safetensors)."


@contextmanager
def _explained(config: ModelConfig) -> Iterator[None]:
    """Turn the libraries' errors about a model that cannot be had into one message."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model={config.name}: {_explanation(config, error)}") from error


def _explanation(config: ModelConfig, error: Exception) -> str:
    from huggingface_hub import errors

    source = config.path or config.hub_id
    causes = list(_chain(error))

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.RevisionNotFoundError):
        return f"{source} has no revision '{config.commit or config.revision}'; see model.revision."
    if caused_by(errors.GatedRepoError) or (config.gated and caused_by(errors.RepositoryNotFoundError)):
        return (
            f"{source} is gated: accept its licence at its page on the hub, then set HF_TOKEN (or run `hf auth login`)."
        )
    if caused_by(errors.RepositoryNotFoundError):
        return f"{source}: no such model on the hub, or a private one (then set HF_TOKEN)."
    if caused_by(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        token = " The model is gated: HF_TOKEN is needed too." if config.gated else ""
        return (
            f"{source} is not in the local cache and the hub cannot be reached. With a network: check HF_ENDPOINT "
            f"and HF_HUB_OFFLINE. Without: copy the model here and use model.path=DIR.{token}"
        )
    if "trust_remote_code" in str(error):
        return f"{source} comes with Python code of its own; model.trust_remote_code=true runs it, if you trust it."
    if "use_safetensors" in str(error):
        return f"{source} has no .safetensors; pickled weights can run code when loaded, so llmkit does not read them."
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{source} cannot be loaded: {first_line}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
