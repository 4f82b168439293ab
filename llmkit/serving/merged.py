"""Adapters that vLLM does not serve beside their base are merged into it first, in a process of its own."""

import subprocess
import sys
from dataclasses import replace

from llmkit.config import TrainConfig
from llmkit.config.schema import ModelConfig
from llmkit.errors import ConfigError, LlmkitError
from llmkit.serving.console import fact
from llmkit.serving.merging import merged_directory
from llmkit.serving.servable import why_merged
from llmkit.serving.target import Target


def merged_where_needed(targets: dict[str, Target], config: TrainConfig, *, dry_run: bool) -> dict[str, Target]:
    """The targets, those that vLLM does not serve as they are replaced by their merged models, which are made now.

    Raises ConfigError if one of several needs it: merged models share no base.
    """
    reasons = {name: why for name, target in targets.items() if (why := why_merged(target, config.serve.adapter))}
    if reasons and len(targets) > 1:
        name, why = next(iter(reasons.items()))
        raise ConfigError(f"serve.all=true: {name} would have to be merged ({why}); serve it alone: sweep= or run=.")
    for name, why in reasons.items():
        fact("merged", f"{name}: {why}, so it is merged into its base{' (not now: dry_run)' if dry_run else ''}")
        if not dry_run:
            _merge(targets[name], config)
    return {name: _merged(target) if name in reasons else target for name, target in targets.items()}


def _merge(target: Target, config: TrainConfig) -> None:
    """In a child: what torch takes of the memory is free again before vLLM starts."""
    export = config.export
    words = [f"merge_base={export.merge_base}", f"export.max_kl={export.max_kl}"]
    words += [f"export.min_top1_agreement={export.min_top1_agreement}", f"export.max_shard_gb={export.max_shard_gb}"]
    command = [sys.executable, "-m", "llmkit.export", target.said, "merge=true", *words]
    if subprocess.run(command, check=False).returncode:
        raise LlmkitError(f"{target.said}: could not be merged, see above; it is not served.")


def _merged(target: Target) -> Target:
    directory = merged_directory(target)
    trusted = target.base.trust_remote_code
    base = ModelConfig(path=str(directory), trust_remote_code=trusted)
    return replace(target, source=str(directory), adapter=None, base=base, is_partial=False)
