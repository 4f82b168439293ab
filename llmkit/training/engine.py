"""What holds the processes of a run together: seen in the model that is really trained, not in what was asked for."""

from typing import Any

import torch


def engine_in_use(trainer: Any) -> str:
    """`single`, `ddp`, `zero1` to `zero3` or `fsdp2`; a trainer that has not begun to train has none yet: `single`."""
    model = trainer.model_wrapped
    if hasattr(model, "zero_optimization_stage"):
        return f"zero{model.zero_optimization_stage()}"
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return "ddp"
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        return "fsdp2"
    return "single"


def shard_weights(trainer: Any) -> None:
    """Divide the weights among the ranks for ZeRO-3, one by one on their way from where they were loaded to the device.

    Left to itself, its engine takes the whole model to the device first (deepspeed 0.19): what stage 3 is for would not
    fit. The weights get the dtype that it would give them.
    """
    import deepspeed

    arguments = trainer.args
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    for parameter in trainer.model.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    deepspeed.init_distributed(verbose=False)  # takes the group there is
    deepspeed.zero.Init(module=trainer.model, config_dict_or_path=arguments.hf_deepspeed_config.config, dtype=dtype)


def is_sharded(trainer: Any) -> bool:
    """Whether the engine may divide the weights themselves among the processes."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def whole_weights(trainer: Any) -> dict[str, torch.Tensor] | None:
    """The weights of a model that no process holds whole, put together on the main one; None where each has them all.

    Every rank takes part.
    """
    engine = engine_in_use(trainer)
    if engine not in ("zero3", "fsdp2"):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)
