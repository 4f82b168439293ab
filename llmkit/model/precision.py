"""What a precision means: the dtype of frozen weights, of trained weights, and of the arithmetic."""

import os
from dataclasses import dataclass

import torch

from llmkit.config.schema import PRECISIONS, HardwareConfig
from llmkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Trained weights stay in float32 under mixed precision: small updates vanish in 16 bits."""

    name: str
    frozen: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None


KINDS = {
    "fp32": Precision(name="fp32", frozen=torch.float32, trained=torch.float32, autocast=None),
    "bf16": Precision(name="bf16", frozen=torch.bfloat16, trained=torch.float32, autocast=torch.bfloat16),
    "fp16": Precision(name="fp16", frozen=torch.float16, trained=torch.float32, autocast=torch.float16),
    "bf16_pure": Precision(name="bf16_pure", frozen=torch.bfloat16, trained=torch.bfloat16, autocast=None),
}


def resolve_device(hardware: HardwareConfig) -> torch.device:
    """The device to train on. Raises ConfigError if the one asked for is not there."""
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"hardware={hardware.name} needs a GPU and torch {torch.__version__} sees none; use hardware=cpu or "
            "hardware=auto, or see `llmkit doctor`."
        )
    if hardware.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ["LOCAL_RANK"] if "LLMKIT_RANKS" in os.environ else 0  # each process of a machine has one
    return torch.device("cuda", int(rank))


def native_precisions(device: torch.device) -> list[str]:
    """The precisions `device` computes without emulation, the best first."""
    if device.type == "cpu":
        return ["fp32", "bf16", "bf16_pure"]  # float16 needs a gradient scaler, which only GPUs have
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return ["bf16", "fp32", "fp16", "bf16_pure"]
    return ["fp16", "fp32"]


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision called `name`, or for `auto` the best of `device`. Raises ConfigError if the device lacks it."""
    native = native_precisions(device)
    if name != "auto" and name not in native:
        known = [kind for kind in PRECISIONS if kind in native]
        raise ConfigError(f"precision={name}: this {device.type} device has {', '.join(known)}, or use auto.")
    return KINDS[native[0] if name == "auto" else name]
