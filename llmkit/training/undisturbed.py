"""A step that leaves no trace: afterwards random states, modes, gradients and the trainer's counters are as before."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def undisturbed(trainer: Any) -> Iterator[None]:
    """Within the block the trainer may do forward and backward passes, but no update. Gradients are gone afterwards."""
    model = trainer.model
    # Enabling gradient checkpointing adds a hook each time, and TRL's DPO does so in every step (transformers 5.19).
    modules = [(module, module.training, dict(module._forward_hooks)) for module in model.modules()]
    attributes = {name: _copied(value) for name, value in vars(trainer).items()}
    python, numpy = random.getstate(), np.random.get_state()
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for parameter in model.parameters():
            parameter.grad = None
        for module, training, hooks in modules:
            module.training = training
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def _copied(value: Any) -> Any:
    """Metrics, counts and batches that a step adds to; what is no tensor or container is not changed by one."""
    if isinstance(value, torch.nn.Parameter):  # a step without an update does not change it, and a copy is not it
        return value
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps a defaultdict what it is
        copied.update({key: _copied(item) for key, item in value.items()})
        return copied
    return value


@contextmanager
def as_in_training(trainer: Any, *, checkpointing: bool) -> Iterator[None]:
    """The model as `train` will have it: mixed precision around its forward pass, and gradient checkpointing."""
    model = trainer.model
    forward, own = model.forward, "forward" in vars(model)

    def forward_in_autocast(*args: Any, **kwargs: Any) -> Any:
        with trainer.accelerator.autocast():
            return forward(*args, **kwargs)

    switched_on = checkpointing and not model.is_gradient_checkpointing
    model.forward = forward_in_autocast
    if switched_on:
        model.gradient_checkpointing_enable(dict(trainer.args.gradient_checkpointing_kwargs or {}) or None)
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward
        if switched_on:
            model.gradient_checkpointing_disable()
