"""What vLLM can serve of an adapter beside its base, and what has to be merged into the base first."""

import json
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError
from llmkit.serving.target import Target

# vLLM 0.32's `max_lora_rank` is one of these.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# PEFT's initialisations after which the base is what it was; the others change it too.
STARTS = (True, False, "gaussian", "orthogonal")


def unservable(adapter: dict[str, Any]) -> str | None:
    """What keeps vLLM 0.32 from serving an adapter of these settings (adapter_config.json) unmerged; None: nothing."""
    if (kind := adapter.get("peft_type", "LORA")) != "LORA":
        return f"an adapter of the kind {kind}"
    if adapter.get("trainable_token_indices"):
        return "rows of new tokens"
    if adapter.get("modules_to_save"):
        return f"modules_to_save ({', '.join(adapter['modules_to_save'])})"
    if adapter.get("use_dora"):
        return "DoRA"
    if adapter.get("init_lora_weights", True) not in STARTS:
        return f"init_lora_weights={adapter['init_lora_weights']}"
    for feature in ("lora_bias", "layer_replication", "alora_invocation_tokens"):
        if adapter.get(feature):
            return feature
    if adapter.get("bias", "none") != "none":
        return f"trained biases (bias={adapter['bias']})"
    if rank_of(adapter) > RANKS[-1]:
        return f"rank {rank_of(adapter)} (at most {RANKS[-1]})"
    return None


def why_merged(target: Target, wanted: str) -> str | None:
    """Why this is served merged into its base; None: it is served beside it, or is a whole model.

    Args:
        wanted: `serve.adapter`.

    Raises:
        ConfigError: if it is to be served unmerged and cannot be.
    """
    if target.is_whole:
        return None
    if target.adapter is None:
        obstacle: str | None = "only some of the base's weights (method=freeze)"
    else:
        obstacle = unservable(target.adapter)
    if obstacle and wanted == "unmerged":
        raise ConfigError(
            f"serve.adapter=unmerged: vLLM does not serve {obstacle} beside a base; leave serve.adapter out, and it is "
            "merged first."
        )
    if obstacle:
        return f"vLLM does not serve {obstacle} beside a base"
    if wanted == "merged":
        return "serve.adapter=merged"
    if wanted == "auto" and target.run is not None and target.run.qlora is not None:
        return "it was trained on a quantized base, which vLLM does not have"
    return None


def rank_of(adapter: dict[str, Any]) -> int:
    """The largest rank in an adapter of these settings."""
    return max([adapter.get("r", 0), *(adapter.get("rank_pattern") or {}).values()])


def lora_arguments(adapters: dict[str, Target], *, name_modules: bool = True) -> list[str]:
    """vLLM's arguments for adapters by the names they are asked for under.

    Args:
        name_modules: say which modules they change; vLLM 0.32 does not find those of experts by their last names.
    """
    settings = [target.adapter for target in adapters.values() if target.adapter is not None]
    largest = max(map(rank_of, settings))
    words = ["--enable-lora", "--max-lora-rank", str(next(rank for rank in RANKS if rank >= largest))]
    words += ["--max-loras", str(len(adapters)), "--max-cpu-loras", str(len(adapters))]
    if name_modules and (modules := _modules(settings)) is not None:
        words += ["--lora-target-modules", *modules]
    paths = {name: Path(target.source).absolute() for name, target in adapters.items()}
    # As JSON: the jobs of a sweep are called KEY=VALUE, and vLLM's short form is NAME=PATH.
    return [*words, "--lora-modules", *(json.dumps({"name": n, "path": str(path)}) for n, path in paths.items())]


def _modules(settings: list[dict[str, Any]]) -> list[str] | None:
    """The last names of all modules that the adapters change; None where one of them is a pattern."""
    names: set[str] = set()
    for adapter in settings:
        if not isinstance(adapter.get("target_modules"), list) or adapter.get("target_parameters"):
            return None
        names |= {module.rpartition(".")[2] for module in adapter["target_modules"]}
    return sorted(names)


def warning_at_training(adapter: dict[str, Any]) -> str | None:
    """What a user should know of serving before an adapter of these settings (PEFT's config) is trained."""
    if obstacle := unservable(adapter):
        return (
            f"vLLM does not serve {obstacle} beside a base: llmkit serve merges this adapter first, which takes room "
            "for a whole model."
        )
    return None
