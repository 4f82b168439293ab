"""Copies of a model that share its weights."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules and settings around the very same parameters and buffers.

    Adapters can be put on the one without the other noticing, as long as nobody writes to the weights they share.
    """
    shared: dict[int, Any] = {}
    for module in model.modules():
        for value in _kept(module):
            shared[id(value)] = value
    return copy.deepcopy(model, shared)


def _kept(module: nn.Module) -> list[Any]:
    """What of a module holds weights: of bitsandbytes' layers also what scales them and what is known of their use."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    scales = [getattr(tensor, "quant_state", None) for tensor in tensors]
    states = [getattr(module, name, None) for name in ("quant_state", "state")]
    return [value for value in (*tensors, *scales, *states) if value is not None]
