"""The reference of DPO: the policy as it stood at the start, kept without a second model where there is an adapter."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmkit.model.adapters import ADAPTER

REFERENCE = "ref"  # TRL's name of the frozen copy of the trained adapter
# Values of lora.init_lora_weights with which a fresh adapter changes nothing, so that the model without it is the
# policy at the start.
NOTHING_AT_FIRST = (True, "gaussian")


def starts_as_nothing(settings: Any) -> bool:
    """Whether a fresh adapter of these settings (peft.LoraConfig) leaves the model's output as it is."""
    return settings.init_lora_weights in NOTHING_AT_FIRST and settings.bias == "none"


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that training `model` does not move. What is not trained is shared: it takes memory once."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


@contextmanager
def plain_copies(model: Any) -> Iterator[None]:
    """Within the block a new adapter of the same settings starts as nothing, whatever they say.

    TRL makes the reference by adding an adapter and copying the values; pissa and others would change the base's
    weights at that moment, once more (peft 0.21).
    """
    settings = model.peft_config[ADAPTER]
    chosen, settings.init_lora_weights = settings.init_lora_weights, True
    try:
        yield
    finally:
        settings.init_lora_weights = chosen


def copy_adapter(model: nn.Module) -> None:
    """Give the reference adapter the values and dtypes of the trained one.

    TRL copies only what has `.default.` in its name, which leaves out the rows of new tokens, and quantized models'
    adapters pass through bfloat16 there (trl 1.16).
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        words = name.split(".")
        if ADAPTER in words:
            twin = parameters[".".join(REFERENCE if word == ADAPTER else word for word in words)]
            twin.data = parameter.data.clone()
            twin.requires_grad_(False)


def forget_reference(model: Any) -> None:
    """Remove the frozen adapter, if there is one: what is delivered is the policy."""
    if REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(REFERENCE)
