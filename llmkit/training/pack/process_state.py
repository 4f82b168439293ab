"""What a run finds in its process and believes to be its own, kept apart where several runs share one."""

import random
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


class ProcessState:
    """Random numbers, modes of torch and Accelerate's singletons of a run that takes turns with others.

    `enter` makes them those of the process and `leave` takes them back, so that a run draws the numbers that it would
    draw alone, and never finds its gradients' state changed by another.
    """

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy: Any = np.random.MT19937()  # seeded by the run
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self._modes = _Modes()
        self._accelerate: list[dict[str, Any]] = [{} for _ in _SINGLETONS]

    def enter(self) -> None:
        """This run's turn begins."""
        self.take_random()
        random.setstate(self._python)
        self._numpy = _exchange_numpy(self._numpy)
        for kind, state in zip(_SINGLETONS, self._accelerate, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)
        self._modes.put_back()

    def leave(self) -> None:
        """This run's turn ends."""
        self.keep_random()
        self._python = random.getstate()
        self._numpy = _exchange_numpy(self._numpy)
        self._accelerate = [dict(kind._shared_state) for kind in _SINGLETONS]
        self._modes.take_off()

    def take_random(self) -> None:
        """Torch draws this run's numbers from now on."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    def keep_random(self) -> None:
        """Torch draws no more numbers of this run for now."""
        self._torch = torch.get_rng_state()
        if torch.cuda.is_initialized():
            self._cuda = torch.cuda.get_rng_state()

    def random(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Torch's random state of this run, to be put back by `set_random`."""
        return self._torch, self._cuda

    def set_random(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Have the run draw its next numbers from an earlier state."""
        self._torch, self._cuda = state


class _Modes:
    """Whether gradients are recorded, and autocast, of a run that waits within a block that has set them."""

    def __init__(self) -> None:
        self._gradients = True
        self._depth = 0  # blocks of autocast: at the end of the outermost one, its cache of cast weights is emptied
        self._autocast = [(device, False, torch.float32) for device in ("cpu", "cuda")]

    def take_off(self) -> None:
        """Keep the modes, and leave torch's defaults."""
        self._gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        self._depth = torch.autocast_increment_nesting() - 1
        for _ in range(self._depth + 1):
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        devices = [device for device, _, _ in self._autocast]
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices
        ]
        for device in devices:
            torch.set_autocast_enabled(device, False)

    def put_back(self) -> None:
        """Set the modes that were kept."""
        torch.set_grad_enabled(self._gradients)
        for _ in range(self._depth):
            torch.autocast_increment_nesting()
        for device, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, enabled)
            if enabled:
                torch.set_autocast_dtype(device, dtype)


_SINGLETONS: tuple[Any, ...] = (GradientState, AcceleratorState, PartialState)


def _exchange_numpy(generator: Any) -> Any:
    """Make it numpy's, and return that which was; copying states takes a hundred times longer."""
    numbers: Any = np.random  # its stubs leave these two out
    before = numbers.get_bit_generator()
    numbers.set_bit_generator(generator)
    return before
