"""`launcher.verify=N`: beside the joint micro-batches of a run's first N steps, the same ones alone.

What a joint pass may differ by from a run's own is rounding: matrix products of other shapes add in another order. How
much that moves a gradient is measured too, by the run's own pass with its rows one padded column longer.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from llmkit.errors import LlmkitError
from llmkit.training.undisturbed import undisturbed

# How many times as far as one more padded column a joint pass may move a gradient: both are draws of the same noise.
# A row in the wrong hands moves it by its own length.
ALLOWED = 10
# What may differ in any case, since the one column may by chance move nothing. Chosen: of sums of n terms the error
# grows as the root of n (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019).
SMALLEST_NOISE = 100 * torch.finfo(torch.float32).eps

# What stands in the column that is added.
OF_PADDING = {"labels": -100}


class PackDiffers(LlmkitError):
    """A run's joint pass is not its own pass."""


class Distance:
    """How far vectors lie from others, in parts of the length of these, over all pairs that were added."""

    def __init__(self) -> None:
        self._apart = self._length = 0.0

    def add(self, vectors: list[torch.Tensor], others: list[torch.Tensor]) -> None:
        for one, other in zip(vectors, others, strict=True):
            self._apart += float((one.double() - other.double()).square().sum())
            self._length += float(other.double().square().sum())

    def __float__(self) -> float:
        return math.sqrt(self._apart / self._length) if self._length else 0.0 if not self._apart else math.inf


class Verification:
    """Compares the first joint passes of one run with passes of its own, which leave no trace.

    Args:
        count: how many of the first micro-batches to compare.
        alone: within it the run's passes are its own.
        joint_passes: how many joint passes the run has had a part in; one of its own proves nothing.
        tell: given what was found, once, in words.
    """

    def __init__(
        self,
        trainer: Any,
        count: int,
        *,
        alone: Callable[[], AbstractContextManager[None]],
        joint_passes: Callable[[], int],
        tell: Callable[[str], None],
    ):
        self.trainer, self.count = trainer, count
        self.alone, self.joint_passes, self.tell = alone, joint_passes, tell
        self.joint, self.padded = Distance(), Distance()
        self.rounding = max(torch.finfo(dtype).eps for dtype in _dtypes(trainer))
        self.done = self.compared = 0
        self._step = trainer.training_step
        trainer.training_step = self._compared

    def _compared(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.done == self.count:
            return self._step(model, inputs, *args, **kwargs)

        def own_pass(batch: dict[str, Any]) -> list[torch.Tensor]:
            with undisturbed(self.trainer), self.alone():
                self._step(model, dict(batch), *args, **kwargs)
                return self._gradients()

        earlier = [(one, one.grad) for one in self._trained()]
        self._forget()
        own = own_pass(inputs)
        with _without_dropout(model) as drops:  # other shapes draw other numbers
            self.padded.add(own_pass(one_longer(inputs)), own_pass(inputs) if drops else own)
        self._forget()
        before = self.joint_passes()
        loss = self._step(model, inputs, *args, **kwargs)
        if self.joint_passes() > before:
            self.joint.add(self._gradients(), own)
            self.compared += 1
        for one, gradient in earlier:
            if gradient is not None:
                one.grad = gradient if one.grad is None else gradient + one.grad
        self._judge()
        return loss

    def _judge(self) -> None:
        """Raises PackDiffers for a difference that is not of rounding; says what was found after the last pass."""
        self.done += 1
        joint, padded = float(self.joint), float(self.padded)
        if joint > max(ALLOWED * padded, SMALLEST_NOISE, self.rounding):
            raise PackDiffers(
                f"launcher.verify: together with other runs its gradient is another one, {joint:.1e} of its length "
                f"away; one more padded column moves it by {padded:.1e}. launcher=local trains each run by itself."
            )
        if self.done == self.count and not self.compared:
            self.tell("nothing compared, it went through the base by itself")
        elif self.done == self.count:
            found = f"{joint:.0e} of their length away from" if joint else "equal to the last bit to"
            of = "" if self.compared == self.count else f"of {self.compared} in {self.count} micro-batches "
            yardstick = (
                f"one more padded column: {padded:.0e}" if padded else "nor does one more padded column move them"
            )
            self.tell(f"gradients {of}{found} those alone ({yardstick})")

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]

    def _gradients(self) -> list[torch.Tensor]:
        return [torch.zeros_like(one) if one.grad is None else one.grad for one in self._trained()]

    def _forget(self) -> None:
        for one in self._trained():
            one.grad = None


def _dtypes(trainer: Any) -> set[torch.dtype]:
    """What a pass computes in."""
    mixed = {torch.bfloat16: trainer.args.bf16, torch.float16: trainer.args.fp16}
    own = {parameter.dtype for parameter in trainer.model.parameters() if parameter.is_floating_point()}
    return own | {dtype for dtype, used in mixed.items() if used}


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[bool]:
    """No module of the model drops anything; yields whether one would have."""
    dropping = [one for one in model.modules() if isinstance(one, nn.Dropout) and one.p > 0]
    shares = [one.p for one in dropping]
    for one in dropping:
        one.p = 0.0
    try:
        yield bool(dropping)
    finally:
        for one, share in zip(dropping, shares, strict=True):
            one.p = share


def one_longer(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with one more padded column."""
    shape = batch["input_ids"].shape
    return {
        name: nn.functional.pad(value, (0, 1), value=OF_PADDING.get(name, 0))
        if isinstance(value, torch.Tensor) and value.shape == shape
        else value
        for name, value in batch.items()
    }
