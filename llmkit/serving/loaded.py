"""A model in this process as training had it: same base, quantization, arithmetic, tokenizer and template."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from llmkit.config.schema import HardwareConfig, QloraConfig
from llmkit.model.loading import load_model
from llmkit.model.methods import loading_dtype
from llmkit.model.precision import Precision, resolve_device, resolve_precision
from llmkit.model.source import explained, hub_arguments
from llmkit.model.structure import token_matrices
from llmkit.serving.target import Target


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its tokenizer, ready to answer; `autocast` is the arithmetic that its forward passes need."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    autocast: torch.dtype | None

    def arithmetic(self) -> AbstractContextManager[None]:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


def load_target(target: Target, *, quantized: bool = True) -> Loaded:
    """The model on this machine's device, an adapter on its base, in evaluation mode.

    Args:
        quantized: with the quantization it was trained with; without, an adapter's base in its original weights.

    Raises:
        ConfigError: if it cannot be had.
    """
    run = target.run
    device = resolve_device(HardwareConfig())
    name = run.precision.name if run else "auto"
    precision = resolve_precision(name if run is None or _computes(name, device) else "auto", device)
    quantization = run.qlora if run and quantized and isinstance(run.qlora, QloraConfig) else None
    dtype = loading_dtype(run, precision) if run and not target.is_whole else precision.frozen
    model: Any = load_model(target.base, dtype=dtype, device=device, quantization=quantization, precision=precision)
    tokenizer = load_target_tokenizer(target)
    if not target.is_whole:
        model = _with_trained_weights(model, tokenizer, target)
    if quantization is None and device.type == "cuda":
        model.to(device)
    model.eval()
    model.requires_grad_(False)
    return Loaded(model=model, tokenizer=tokenizer, device=device, autocast=_autocast(target, precision))


def load_target_tokenizer(target: Target) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with the model or the adapter, template included."""
    with explained(target.base):
        if target.run is None and target.is_whole:
            arguments = hub_arguments(target.base)
            return AutoTokenizer.from_pretrained(target.source, **arguments)
        return AutoTokenizer.from_pretrained(target.source, trust_remote_code=target.base.trust_remote_code)


def _with_trained_weights(model: Any, tokenizer: PreTrainedTokenizerBase, target: Target) -> Any:
    """The base with the adapter on it, or with the trained weights in it, and what it generates with."""
    from llmkit.training.checkpoints.contents import load_weights

    if len(tokenizer) > len(token_matrices(model)[0]):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    directory = Path(target.source)
    if target.adapter is None:
        model.requires_grad_(False)  # else load_weights asks for all that could be trained
        load_weights(model, directory)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(directory))
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _computes(name: str, device: torch.device) -> bool:
    from llmkit.model.precision import native_precisions

    return name in native_precisions(device)


def _autocast(target: Target, precision: Precision) -> torch.dtype | None:
    """Trained weights in float32 meet frozen ones in 16 bits; a whole model is loaded in one dtype."""
    return None if target.is_whole else precision.autocast
