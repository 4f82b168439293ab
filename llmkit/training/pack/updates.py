"""What the adapters of several runs add to the product of one layer: each to its own rows of the batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from llmkit.model.adapters import ADAPTER
from llmkit.training.pack.process_state import ProcessState


class Owner(Protocol):
    """One of the runs whose rows are in a batch; `layers` are those of its decoder that PEFT has replaced, by name."""

    state: ProcessState
    layers: dict[str, nn.Module]


@dataclass(frozen=True)
class Span:
    """Rows of a joint batch, and how long they were before they were padded."""

    first: int
    last: int
    length: int


@dataclass(frozen=True)
class Rows(Span):
    """Those that belong to one run."""

    owner: Owner


def adds_to_product(layer: nn.Module) -> bool:
    """Whether PEFT's layer adds B(A(dropout(x))) to a matrix product with the frozen weights, and does nothing else."""
    return isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A and ADAPTER not in layer.lora_variant


def with_update(part: Rows, layer: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """One run's rows `out` of the base's product, with what its adapter makes of its rows `x` added.

    To what pads them nothing is: it would draw other numbers for its dropout than alone.
    """
    if layer is None:
        return out
    if part.length == x.shape[1]:
        return _updated(part.owner, layer, x, out)
    updated = _updated(part.owner, layer, unpadded(x, part), out[:, : part.length])
    return torch.cat([updated, out[:, part.length :]], dim=1)


def unpadded(x: torch.Tensor, part: Rows) -> torch.Tensor:
    """One run's rows without what pads them; contiguous, or a GPU draws their dropout in another order than alone."""
    return x[:, : part.length].contiguous()


def _updated(owner: Owner, layer: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What the run's adapter makes of the layer's output, in the order of operations in which PEFT 0.21 does it."""
    lora_A, lora_B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    dropout, dtype = layer.lora_dropout[ADAPTER], out.dtype
    is_quantized = type(layer).__module__.endswith("bnb")
    if not (is_quantized and torch.is_autocast_enabled()):
        x = layer._cast_input_dtype(x, lora_A.weight.dtype)
    if isinstance(dropout, nn.Dropout):
        with drawing(owner):
            x = dropout(x)
    update = lora_B(lora_A(x)) * layer.scaling[ADAPTER]
    if is_quantized:
        update = update.to(dtype)
    return (out + update).to(dtype)


@contextmanager
def drawing(owner: Owner) -> Iterator[None]:
    """What is drawn within are the owner's random numbers."""
    owner.state.take_random()
    try:
        yield
    finally:
        owner.state.keep_random()


@dataclass(frozen=True, slots=True)
class PlainUpdate:
    """One run's B(A(x)) * scaling, without dropout: `lora_A` (rank, input), `lora_B` (output, rank)."""

    span: Span
    scaling: float
    lora_A: torch.Tensor
    lora_B: torch.Tensor


def plain_updates(parts: Sequence[tuple[Rows, Any]], x: torch.Tensor, out: torch.Tensor) -> list[PlainUpdate] | None:
    """What all runs add to a layer's output; None if for one it is more than products in the type of `out`.

    Args:
        parts: each run's rows, with its own layer, or None where it has no adapter.
        x: (rows, tokens, input).
        out: (rows, tokens, output), the base's product.
    """
    if not (x.dim() == out.dim() == 3 and x.is_contiguous() and out.is_contiguous()):
        return None
    device = x.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    taken = {computed, torch.float32} if torch.is_autocast_enabled(device) else {computed}
    if out.dtype != computed or x.dtype not in taken:
        return None
    updates = []
    for part, layer in parts:
        if layer is None:
            continue
        lora_A, lora_B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        same_type = {lora_A.weight.dtype, lora_B.weight.dtype} <= taken
        if lora_B.bias is not None or not same_type or not isinstance(layer.lora_dropout[ADAPTER], nn.Identity):
            return None
        span = Span(part.first, part.last, part.length)
        updates.append(PlainUpdate(span, layer.scaling[ADAPTER], lora_A.weight, lora_B.weight))
    return updates


def add_at_once(out: torch.Tensor, x: torch.Tensor, updates: Sequence[PlainUpdate]) -> torch.Tensor:
    """The base's product with the updates of all runs added: in place, unless it is a view, whose gradient is copied
    at every change.
    """
    if not updates:
        return out
    # As autocast would, whose products have the type of `out`.
    weights = [weight.to(out.dtype) for update in updates for weight in (update.lora_A, update.lora_B)]
    spans = [update.span for update in updates]
    scalings = [update.scaling for update in updates]
    out = out.clone() if out._is_view() else out
    added: torch.Tensor = _AddAtOnce.apply(out, x.to(out.dtype), spans, scalings, *weights)
    return added


class _AddAtOnce(torch.autograd.Function):
    """What autograd would do for each run's update, product by product, so that no bit differs on a CPU.

    (But for a single token at rank 1, where autograd multiplies in another order.) Rows that nothing pads are read and
    written where they are: to put them together again, forwards and backwards, took an eighth of a joint pass (25
    million parameters, float32, ten runs of 28 tokens, two cores).
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        x: torch.Tensor,
        spans: Sequence[Span],
        scalings: Sequence[float],
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        inner = []
        for span, scaling, lora_A, lora_B in zip(spans, scalings, weights[::2], weights[1::2], strict=True):
            h = _tokens_of(x, span) @ lora_A.t()
            rows = _rows_of(out, span)
            rows.add_((h @ lora_B.t()).mul_(scaling).view(rows.shape))
            inner.append(h)
        ctx.spans, ctx.scalings = spans, scalings
        ctx.save_for_backward(x, *inner, *weights)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        inner, weights = saved[: len(ctx.spans)], saved[len(ctx.spans) :]
        gradient = gradient.contiguous()
        of_x = _room_for(ctx.spans, x) if ctx.needs_input_grad[1] else None
        of_weights: list[torch.Tensor] = []
        for span, scaling, h, lora_A, lora_B in zip(
            ctx.spans, ctx.scalings, inner, weights[::2], weights[1::2], strict=True
        ):
            of_product = _tokens_of(gradient, span) * scaling
            of_h = of_product @ lora_B
            of_weights += [of_h.t() @ _tokens_of(x, span), of_product.t() @ h]
            if of_x is None:
                continue
            if _is_whole(span, of_x):
                torch.mm(of_h, lora_A, out=_tokens_of(of_x, span))
            else:
                rows = _rows_of(of_x, span)
                rows.copy_((of_h @ lora_A).view(rows.shape))
        return gradient, of_x, None, None, *of_weights


def _room_for(spans: Sequence[Span], batch: torch.Tensor) -> torch.Tensor:
    """Like the batch, with zeros unless the spans are all of it."""
    covered = sum(span.last - span.first for span in spans if _is_whole(span, batch))
    return torch.empty_like(batch) if covered == len(batch) else torch.zeros_like(batch)


def _is_whole(span: Span, batch: torch.Tensor) -> bool:
    return span.length == batch.shape[1]


def _rows_of(batch: torch.Tensor, span: Span) -> torch.Tensor:
    """Those of (rows, tokens, width), without what pads them."""
    return batch[span.first : span.last, : span.length]


def _tokens_of(batch: torch.Tensor, span: Span) -> torch.Tensor:
    """The same, one token below the other: where it is, if nothing pads it."""
    _, tokens, width = batch.shape
    if _is_whole(span, batch):
        return batch.view(-1, width)[span.first * tokens : span.last * tokens]
    return _rows_of(batch, span).reshape(-1, width)
