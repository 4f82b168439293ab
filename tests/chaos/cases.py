"""The runs that are killed: small ones that between them train in every way llmkit knows."""

from typing import Any

from llmkit.config import TrainConfig, resolve, validate
from llmkit.config.arguments import parse_arguments
from llmkit.config.registration import register

SHARED = {
    "hardware": "cpu",
    "precision": "fp32",
    "evaluation": "off",  # of answers; the loss on held-out rows is measured all the same
    "training.max_steps": 12,
    "training.eval_steps": 3,
    "training.logging_steps": 3,  # not a multiple of save_steps: the interval's sums have to be in the checkpoint
    "training.save_steps": 2,
    "checkpoint.keep": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "freeze.last_n_layers": 1, "training.save_steps": 3, "training.logging_steps": 2},
    "lora": {"method": "lora", "lora.lora_dropout": 0.1, "training.save_steps": 1},
    "qlora": {"method": "qlora", "qlora.bits": 4, "lora.lora_dropout": 0.1},
    "dpo": {"recipe": "dpo", "method": "lora", "lora.lora_dropout": 0.1, "dpo.disable_dropout": False},
    "dpo-full": {"recipe": "dpo", "method": "full", "training.save_steps": 3, "training.logging_steps": 2},
    "packing": {"method": "lora", "data.packing": "bfd", "data.max_length": 96, "training.global_batch_size": 4},
    "accumulation": {
        "method": "full",
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.logging_steps": 5,
        "training.save_steps": 3,
    },
    # So high a rate is best early on: what is delivered was saved long before the last kill.
    "best": {
        "method": "lora",
        "evaluation": "default",
        "evaluation.examples": 8,
        "checkpoint.keep": 1,
        "training.final": "best",
        "training.learning_rate": 0.02,
        "training.lr_scheduler_type": "constant",
    },
}


def config_of(case: str) -> TrainConfig:
    """The resolved, validated config of a case, as the train verb makes it."""
    from hydra import compose, initialize_config_module

    register()
    words = [f"{key}={value}" for key, value in (SHARED | CASES[case]).items()]
    with initialize_config_module("llmkit.conf", version_base="1.3"):
        composed = compose("train", overrides=parse_arguments(words).overrides)
    config = resolve(composed)
    validate(config)
    return config
