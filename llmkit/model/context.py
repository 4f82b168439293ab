"""How long an example may be: what the model takes, and `data.max_length` where it is left open. Free of torch."""

from typing import Any

from llmkit.config.schema import ModelConfig, TrainConfig
from llmkit.errors import ConfigError
from llmkit.model.source import explained, hub_arguments, model_source

LONGEST_DEFAULT = 2048  # tokens, where data.max_length is unset


def load_model_config(config: ModelConfig) -> Any:
    """The model's own config (Transformers' object)."""
    from transformers import AutoConfig

    with explained(config):
        return AutoConfig.from_pretrained(model_source(config), **hub_arguments(config))


def settle_lengths(config: TrainConfig) -> int:
    """Fill in `model.context_length` and `data.max_length`, in place, where they are left to the model's own config.

    Returns the longest example in tokens. Raises ConfigError if the model takes no example of `data.max_length`.
    """
    model, data = config.model, config.data
    if model.context_length is None:
        own = load_model_config(model)
        model.context_length = getattr(own.get_text_config(), "max_position_embeddings", None)
        if model.context_length is not None:
            config.derived.append("model.context_length")
    context = model.context_length
    if data.max_length is None:
        data.max_length = min(context or LONGEST_DEFAULT, LONGEST_DEFAULT)
        config.derived.append("data.max_length")
    elif context is not None and data.max_length > context:
        raise ConfigError(f"data.max_length={data.max_length}: {model.name} takes at most {context} tokens.")
    return data.max_length
