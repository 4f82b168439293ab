"""What to change when memory runs out, the cheapest first. Free of torch: an error is explained before it is loaded."""

import re
from collections.abc import Iterator

from llmkit.config import TrainConfig

# What allocators write, beside torch.OutOfMemoryError and MemoryError: PyTorch's of a CPU, cuBLAS's.
WORDS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine, had no memory left to give."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def reason(error: BaseException) -> str:
    """What an allocator said, in one line without its own line numbers."""
    text = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[enforce fail[^]]*\] [^.]*\. ", "", text).rstrip(".") or type(error).__name__


def halves(number: int) -> Iterator[int]:
    """The number, its half, the half of that, ... down to 1."""
    while number:
        yield number
        number //= 2


def smaller_batches(micro_batch: int, accumulation: int) -> Iterator[tuple[int, int]]:
    """The micro-batch halved again and again, with the accumulation that keeps the examples of a step; first as is."""
    examples = micro_batch * accumulation
    yield micro_batch, accumulation
    while micro_batch > 1:
        micro_batch = max(size for size in range(1, micro_batch // 2 + 1) if examples % size == 0)
        yield micro_batch, examples // micro_batch


def batch_overrides(micro_batch: int, accumulation: int) -> str:
    """The two overrides, as they are typed."""
    return f"training.per_device_train_batch_size={micro_batch} training.gradient_accumulation_steps={accumulation}"


def costlier_changes(config: TrainConfig) -> list[str]:
    """Overrides that change more than the speed, each with what it costs; none of them has been tried.

    A loss in chunks is not among them: TRL's trainers never hold all logits at once (trl 1.16, add_fused_lm_head).
    """
    method, training = config.method.name, config.training
    whole = method in ("full", "freeze")
    changes = []
    if config.precision.name == "fp32":
        changes.append("precision=bf16 (16-bit arithmetic: half the activations, and half of weights that are frozen)")
    if whole and training.optim.startswith("adamw_torch"):
        changes.append("training.optim=adamw_8bit (optimizer state in a quarter; needs bitsandbytes)")
    if whole:
        changes.append("method=lora (gradients and optimizer state for the adapter alone)")
    if method != "qlora":
        changes.append("method=qlora (frozen weights in 4 bits; needs bitsandbytes)")
    return changes


def untried_changes(config: TrainConfig) -> list[str]:
    """All overrides that would help, the cheapest first."""
    training = config.training
    changes = []
    batches = smaller_batches(training.per_device_train_batch_size or 1, training.gradient_accumulation_steps or 1)
    if smaller := list(batches)[1:]:
        changes.append(f"{batch_overrides(*smaller[0])} (the same loss and gradients)")
    if not training.gradient_checkpointing:
        changes.append("training.gradient_checkpointing=true (one more forward pass)")
    if config.data.max_length:
        packs = "shorter packs" if config.data.packing != "none" else "longer rows need data.on_overlong"
        changes.append(f"data.max_length={config.data.max_length // 2} ({packs})")
    return changes + costlier_changes(config)
