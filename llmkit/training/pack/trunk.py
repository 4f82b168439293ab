"""The decoder that several adapters train on together: each layer's frozen weights are applied to all rows at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from llmkit.training.pack.process_state import ProcessState

ADAPTER = "default"  # PEFT's name of the trained adapter
OF_OTHER_HEADS = ("summary", "classifier")  # settings of what a language model does not have

# Of a decoder's inputs: those with a number for each token, and what stands at the end of a row that is shorter.
OF_EACH_TOKEN = {"input_ids": 0, "attention_mask": 0, "position_ids": 0}


class Owner(Protocol):
    """One of the runs whose rows are in a batch; `layers` are those of its decoder that PEFT has replaced, by name."""

    state: ProcessState
    layers: dict[str, nn.Module]


@dataclass(frozen=True)
class Rows:
    """The rows of a joint batch that belong to one run, and how long they were before they were padded."""

    owner: Owner
    first: int
    last: int
    length: int


class JointTrunk:
    """A decoder without adapters of its own, in which every adapted layer sends each run's rows through its adapter.

    Args:
        model: the base, of which it makes its own modules around the same weights.
        autocast: the mode of mixed precision, as the runs' own trainers would enter it.
        checkpointing: whether activations are computed again in the backward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        checkpointing: bool = False,
    ):
        self._rows: list[Rows] = []
        self._autocast = autocast
        self._model = model
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._same_numbers})
        self._trunk: nn.Module = model.base_model
        self._trunk.train()
        self._packed: set[str] = set()

    def forward(self, owners: Sequence[Owner], batches: Sequence[dict[str, Any]]) -> "JointStep":
        """The last hidden states of all batches, each (rows, tokens, width), with what `backward` needs."""
        for owner in owners:
            self._pack(owner)
        inputs, self._rows = join(owners, batches)
        with self._autocast():
            hidden = self._trunk(**inputs).last_hidden_state
        return JointStep(hidden, self._rows)

    def _pack(self, owner: Owner) -> None:
        """Have the layers that the owner's adapter is on send it its rows."""
        for name in owner.layers.keys() - self._packed:
            layer = _PackedLayer(name, self._trunk.get_submodule(name), self._rows_now)
            self._trunk.set_submodule(name, layer)
            self._packed.add(name)

    def _rows_now(self) -> list[Rows]:
        return self._rows

    def _same_numbers(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a layer that is computed again: its dropouts are those of the first time."""
        before: list[tuple[ProcessState, Any]] = []

        @contextmanager
        def remember() -> Iterator[None]:
            before.extend((rows.owner.state, rows.owner.state.random()) for rows in self._rows)
            yield

        @contextmanager
        def repeat() -> Iterator[None]:
            now = [(state, state.random()) for state, _ in before]
            try:
                for state, numbers in before:
                    state.set_random(numbers)
                yield
            finally:  # torch leaves by an exception as soon as it has what it needs
                for state, numbers in now:
                    state.set_random(numbers)

        return remember(), repeat()


class JointStep:
    """A forward pass of all, whose backward pass waits for the gradients of each."""

    def __init__(self, hidden: torch.Tensor, rows: Sequence[Rows]):
        self._hidden = hidden
        self._leaves = [hidden[part.first : part.last, : part.length].detach().requires_grad_() for part in rows]

    @property
    def hidden(self) -> list[torch.Tensor]:
        """Each owner's part; its loss and the gradient of that are its own business."""
        return self._leaves

    def backward(self) -> None:
        """Send on the gradients that have come to the parts; one without any adds nothing."""
        gradient = torch.zeros_like(self._hidden)
        first = 0
        for leaf in self._leaves:
            if leaf.grad is not None:
                gradient[first : first + len(leaf), : leaf.shape[1]] = leaf.grad
            first += len(leaf)
        self._hidden.backward(gradient)


class _PackedLayer(nn.Module):
    """In place of a layer that some run's adapter is on."""

    def __init__(self, name: str, base: nn.Module, rows: Callable[[], list[Rows]]):
        super().__init__()
        self.base = base
        self._name, self._rows = name, rows

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts = [(part, part.owner.layers.get(self._name)) for part in self._rows()]
        if any(layer is not None and not adds_to_product(layer) for _, layer in parts):
            return torch.cat([self._apart(part, layer, x, *args, **kwargs) for part, layer in parts])
        together = self.base(x, *args, **kwargs)
        outs = []
        for part, layer in parts:
            out = together[part.first : part.last]
            outs.append(out if layer is None else with_update(part.owner, layer, x[part.first : part.last], out))
        return torch.cat(outs)

    def _apart(self, part: Rows, layer: nn.Module | None, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What one run's own layer makes of its rows, where that is more than an addition to the base's product."""
        with drawing(part.owner):
            return (layer or self.base)(x[part.first : part.last], *args, **kwargs)


def adds_to_product(layer: nn.Module) -> bool:
    """Whether PEFT's layer adds B(A(dropout(x))) to a matrix product with the frozen weights, and does nothing else."""
    return isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A and ADAPTER not in layer.lora_variant


def with_update(owner: Owner, layer: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What the run's adapter makes of the layer's output, in the order of operations in which PEFT 0.21 does it."""
    lora_A, lora_B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    dropout, dtype = layer.lora_dropout[ADAPTER], out.dtype
    x = layer._cast_input_dtype(x, lora_A.weight.dtype)
    if isinstance(dropout, nn.Dropout):
        with drawing(owner):
            x = dropout(x)
    update = lora_B(lora_A(x)) * layer.scaling[ADAPTER]
    if type(layer).__module__.endswith("bnb"):
        update = update.to(dtype)
    return (out + update).to(dtype)


@contextmanager
def drawing(owner: Owner) -> Iterator[None]:
    """What is drawn within are the owner's random numbers."""
    owner.state.take_random()
    yield
    owner.state.keep_random()


def replaced_layers(trunk: nn.Module, within: str = "") -> dict[str, nn.Module]:
    """The layers that PEFT has put in place of a decoder's own, by the names of those."""
    found: dict[str, nn.Module] = {}
    for name, layer in trunk.named_children():
        name = f"{within}{name}"
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found[name] = layer
        else:
            found |= replaced_layers(layer, f"{name}.")
    return found


def own_dropout(trunk: nn.Module) -> str:
    """The names of a decoder's own dropouts that are on, adapters left out; empty if there are none."""
    replaced = tuple(f"{name}." for name in replaced_layers(trunk))
    modules = [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Dropout) and module.p > 0 and not name.startswith(replaced)
    ]
    settings: dict[str, Any] = trunk.config.to_dict()  # type: ignore[union-attr, operator]
    functional = [
        name
        for name, value in settings.items()
        if ("dropout" in name or name.endswith("pdrop"))
        and not name.startswith(OF_OTHER_HEADS)
        and isinstance(value, float)
        and value > 0
    ]
    return ", ".join(functional or modules[:1])


def join(owners: Sequence[Owner], batches: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[Rows]]:
    """One batch of all, rows below rows, the shorter ones padded at their end; and whose they are."""
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    rows, first = [], 0
    for owner, batch, length in zip(owners, batches, lengths, strict=True):
        rows.append(Rows(owner, first, first := first + len(batch["input_ids"]), length))
    joint = dict(batches[0])
    for name in OF_EACH_TOKEN.keys() & joint.keys():
        padded = [
            nn.functional.pad(batch[name], (0, max(lengths) - length), value=OF_EACH_TOKEN[name])
            for batch, length in zip(batches, lengths, strict=True)
        ]
        joint[name] = torch.cat(padded)
    return joint, rows


def can_join(batches: Sequence[dict[str, Any]]) -> bool:
    """Whether `join` knows what to do with them."""
    first = {name: value for name, value in batches[0].items() if name not in OF_EACH_TOKEN}
    return all(
        batch.keys() == batches[0].keys()
        and all(batch[name].dim() == 2 for name in OF_EACH_TOKEN.keys() & batch.keys())
        and all(not isinstance(value, torch.Tensor) and batch[name] == value for name, value in first.items())
        for batch in batches
    )
