"""Our config -> the arguments of TRL's and Transformers' trainers. Every name on the right is upstream's."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from llmkit.config.schema import DeepSpeedConfig, DistributedConfig, DpoConfig, TrainConfig, TrainingConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.model.precision import Precision

# From here on, recomputing activations costs less than running out of memory.
CHECKPOINTING_FROM_PARAMETERS = 0.5e9


def training_arguments(
    config: TrainConfig, *, output_dir: Path, precision: Precision, device: torch.device, steps: int
) -> dict[str, Any]:
    """Keyword arguments for TrainingArguments or a TRL config, for a config whose derived values are filled in.

    Args:
        steps: optimizer steps of the whole run, which shares of the run are taken of.

    Raises:
        ConfigError: an optimizer, tracker or DeepSpeed that is not there.
    """
    training = config.training
    optimizers = [name.value for name in OptimizerNames]
    if training.optim not in optimizers:
        raise ConfigError(
            f"training.optim={training.optim}: unknown.{did_you_mean(training.optim, optimizers)} "
            f"One of {', '.join(optimizers)}."
        )
    _check_libraries(config)
    return {
        "output_dir": str(output_dir),
        "seed": config.seed,
        "data_seed": config.seed,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "gradient_checkpointing": training.gradient_checkpointing,
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "include_num_input_tokens_seen": "non_padding",  # kept in checkpoints, unlike TRL's own count
        "logging_nan_inf_filter": False,  # a loss that is not finite stops the run; it is never averaged away
        "eval_strategy": "no" if config.data.validation is None else "steps",
        "eval_steps": None if config.data.validation is None else whole_steps(training.eval_steps, steps),
        "save_strategy": "no" if training.save_steps is None else "steps",
        "save_steps": whole_steps(training.save_steps or 1, steps),
        "bf16": precision.autocast == torch.bfloat16,
        "fp16": precision.autocast == torch.float16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": True,
        "report_to": config.tracking.report_to or "none",
        "run_name": config.tracking.run_name,
        "deepspeed": deepspeed_dict(config.deepspeed, training),
        "ddp_find_unused_parameters": False,
        **_fsdp_arguments(config.distributed),
    }


def _fsdp_arguments(config: DistributedConfig) -> dict[str, Any]:
    """Those that make Accelerate divide the model with torch's FSDP2, decoder layer by decoder layer."""
    if config.name != "fsdp2":
        return {}
    settings = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": config.reshard_after_forward,
        "cpu_offload": config.cpu_offload,
        "state_dict_type": "FULL_STATE_DICT",
    }
    return {"fsdp": True, "fsdp_config": settings}


def dpo_arguments(settings: DpoConfig) -> dict[str, Any]:
    """Keyword arguments for TRL's DPOConfig, beside those of `training_arguments`."""
    return {
        "loss_type": settings.loss_type,
        "loss_weights": settings.loss_weights,
        "beta": settings.beta,
        "label_smoothing": settings.label_smoothing,
        "f_divergence_type": settings.f_divergence_type,
        "f_alpha_divergence_coef": settings.f_alpha_divergence_coef,
        "use_weighting": settings.use_weighting,
        "ld_alpha": settings.ld_alpha,
        "discopop_tau": settings.discopop_tau,
        "disable_dropout": settings.disable_dropout,
        "precompute_ref_log_probs": settings.precompute_ref_log_probs,
        "precompute_ref_batch_size": settings.precompute_ref_batch_size,
        "max_length": None,  # the data is prepared: nothing is cut here
    }


def whole_steps(interval: float, steps: int) -> int:
    """An interval in steps; below 1 it is a share of the run."""
    return math.ceil(interval * steps) if interval < 1 else int(interval)


def _check_libraries(config: TrainConfig) -> None:
    from transformers.integrations import get_available_reporting_integrations

    if config.deepspeed.stage and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"deepspeed={config.deepspeed.name}: DeepSpeed is not installed; add it with: make deepspeed")
    available = get_available_reporting_integrations()
    for tracker in config.tracking.report_to:
        if tracker not in available:
            raise ConfigError(
                f"tracking.report_to=[{tracker}]: unknown, or its package is not installed."
                f"{did_you_mean(tracker, available)} Here: {', '.join(available) or 'none'}."
            )


def deepspeed_dict(config: DeepSpeedConfig, training: TrainingConfig) -> dict[str, Any] | None:
    """DeepSpeed's own config; `auto` values are filled in by Transformers from its arguments. None without ZeRO."""
    if config.stage == 0:
        return None
    zero: dict[str, Any] = {
        "stage": config.stage,
        "overlap_comm": config.overlap_comm,
        "contiguous_gradients": config.contiguous_gradients,
        "reduce_bucket_size": config.reduce_bucket_size,
    }
    for key in ("offload_optimizer", "offload_param"):
        if getattr(config, key) != "none":
            zero[key] = {"device": getattr(config, key), "pin_memory": True}
    if config.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = config.stage3_gather_16bit_weights_on_model_save
    return {
        **_host_optimizer(config, training),
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def _host_optimizer(config: DeepSpeedConfig, training: TrainingConfig) -> dict[str, Any]:
    """State in host memory is stepped there by DeepSpeed's own AdamW; torch's would take many times longer."""
    if config.offload_optimizer == "none":
        return {}
    if not training.optim.startswith("adamw_torch"):
        return {"zero_force_ds_cpu_optimizer": False}
    names = ("lr", "betas", "eps", "weight_decay")
    return {"optimizer": {"type": "AdamW", "params": dict.fromkeys(names, "auto")}}


def total_steps(training: TrainingConfig, examples: int) -> int:
    """Optimizer steps of the run on all its devices, as Transformers counts them."""
    return training.max_steps or math.ceil(training.num_train_epochs * steps_per_pass(training, examples))


def steps_per_pass(training: TrainingConfig, examples: int) -> int:
    """Optimizer steps of one pass over the data; the last may have fewer examples."""
    assert training.global_batch_size
    return max(math.ceil(examples / training.global_batch_size), 1)
