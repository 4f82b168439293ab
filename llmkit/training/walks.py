"""Upstream asks every module of a model several times in each step, some thousand of them with adapters.

Whether it is in training mode, for its gradient to forget it and to clip it (transformers 5.19): an eighth of a small
model's step on a CPU, and on a GPU time in which it waits for work, where its steps are short.
"""

from typing import Any

from torch import nn


def shorten_walks(model: nn.Module) -> list[nn.Parameter]:
    """Put the model into training mode, and have it visit its modules only where something changes.

    Call it when it is settled what is trained. Returns that: the parameters that will have gradients.
    """
    kind: Any = type(model)
    kind.train(model)  # a model just loaded is in evaluation mode below an adapter's wrapper, which is not
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train(mode: bool = True) -> nn.Module:
        return model if mode == model.training else kind.train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    return trained
