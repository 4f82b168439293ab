"""The decoder that several adapters train on together: each layer's frozen weights are applied to all rows at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from llmkit.training.pack.process_state import ProcessState
from llmkit.training.pack.updates import (
    Owner,
    Rows,
    add_at_once,
    adds_to_product,
    drawing,
    plain_updates,
    unpadded,
    with_update,
)

LENGTH_DEPENDENT_ROPES = {"dynamic", "longrope"}

# Of a decoder's inputs: those with a number for each token, and what stands at the end of a row that is shorter.
OF_EACH_TOKEN = {"input_ids": 0, "attention_mask": 0, "position_ids": 0}


class NotOfRows(RuntimeError):
    """A layer is not given the batch as rows of tokens, so that it cannot tell whose is what."""


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

    def why_apart(self) -> str | None:
        """Why this decoder cannot be applied to the batches of several runs at once; None if it can."""
        settings: dict[str, Any] = self._trunk.config.to_dict()  # type: ignore[union-attr, operator]
        ropes = settings.get("rope_parameters") or {}
        kinds = {str(one.get("rope_type")) for one in (ropes, *ropes.values()) if isinstance(one, dict)}
        if moving := sorted(kinds & LENGTH_DEPENDENT_ROPES):
            return f"its positions ({', '.join(moving)}) depend on the longest row of a batch"
        if settings.get("output_router_logits"):
            return "the loss of its router is of a whole batch"
        before, any_tokens = _random_states(), torch.zeros(1, 2, dtype=torch.long, device=self._model.device)
        with torch.no_grad(), self._autocast(), torch.random.fork_rng(_gpus()):
            try:
                self._trunk(input_ids=any_tokens, use_cache=False)
            except Exception as error:  # whatever it wants, it is not known here
                return f"it takes more than tokens ({type(error).__name__}: {error})"
            after = _random_states()
        if any(not one.equal(other) for one, other in zip(before, after, strict=True)):
            return "it draws random numbers of its own, dropout say, which would be others for joint batches"
        return None

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
        count, tokens = parts[-1][0].last, max(part.length for part, _ in parts)
        in_rows = x
        if x.shape[:2] != (count, tokens):  # some decoders flatten the batch before their linear layers, as OPT's
            if x.dim() != 2 or len(x) != count * tokens:
                raise NotOfRows(self._name)
            in_rows = x.view(count, tokens, -1)
        # The gradients of a split are put together at once; each slice's would be a batch of zeros but for its rows.
        rows = [part.last - part.first for part, _ in parts]
        if any(layer is not None and not adds_to_product(layer) for _, layer in parts):
            if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
                raise NotOfRows(self._name)
            outs = [
                self._apart(part, layer, own, *args, **kwargs)
                for (part, layer), own in zip(parts, in_rows.split(rows), strict=True)
            ]
        else:
            together = self.base(x, *args, **kwargs)
            updates = plain_updates(parts, x, together)
            if updates is not None:
                return add_at_once(together, x, updates)
            together = together.view(count, tokens, -1)
            outs = [
                with_update(part, layer, own, out)
                for (part, layer), own, out in zip(parts, in_rows.split(rows), together.split(rows), strict=True)
            ]
        out = torch.cat(outs)
        return out if in_rows is x else out.flatten(0, 1)

    def _apart(self, part: Rows, layer: nn.Module | None, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What one run's own layer makes of its rows, where that is more than an addition to the base's product."""
        with drawing(part.owner):
            out = (layer or self.base)(unpadded(x, part), *args, **kwargs)
        missing = x.shape[1] - part.length
        return nn.functional.pad(out, (0, 0, 0, missing)) if missing else out


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


def _gpus() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def _random_states() -> list[torch.Tensor]:
    """Those that torch draws from now, on the CPU and the GPU in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _gpus())]


def join(owners: Sequence[Owner], batches: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[Rows]]:
    """One batch of all, rows below rows, the shorter ones padded at their end; and whose they are."""
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    rows, first = [], 0
    for owner, batch, length in zip(owners, batches, lengths, strict=True):
        rows.append(Rows(first, first := first + len(batch["input_ids"]), length, owner))
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
