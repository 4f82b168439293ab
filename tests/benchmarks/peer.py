"""What benchmarks beside TRL share: the environment of everything measured, TRL's command, a model of some size."""

import json
import os
import shutil
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
LLMKIT = [sys.executable, "-m", "llmkit", "train"]
TRL = [str(Path(sys.executable).with_name("trl")), "sft"]


def closed_world(scratch: Path) -> dict[str, str]:
    """The environment of everything measured: this checkout, caches of its own, no network."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        "LLMKIT_CACHE": str(scratch / "llmkit"),
        "HF_HOME": str(scratch / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",  # trl's loss is read from its output the moment it is printed
    }


def words_of_trl(rows: Path, model: Path, output: Path, **more: object) -> list[str]:
    """The `trl sft` command that trains what llmkit does here, with these settings beside or in place of the common.

    One that is None is left to TRL's own default.
    """
    settings: dict[str, object] = {
        "model_name_or_path": model,
        "dataset_name": rows,
        "output_dir": output,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 16,
        "max_steps": 1,
        "logging_steps": 1,
        "max_length": 2048,
        "assistant_only_loss": "true",
        "gradient_checkpointing": "false",
        "bf16": "false",
        "dtype": "float32",
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
    }
    return [
        *TRL,
        "--use_peft",
        *(word for name, value in (settings | more).items() if value is not None for word in (f"--{name}", str(value))),
    ]


def model_of_25m(directory: Path) -> Path:
    """The tiny model's files with random weights of 25 million parameters, made in `directory`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmkit.model.tiny import tiny_model

    shutil.copytree(tiny_model(), directory, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")) | sizes | heads
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    return directory
