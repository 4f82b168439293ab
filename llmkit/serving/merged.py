"""Adapters that vLLM does not serve beside their base are merged into it first, in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from llmkit.config.schema import ModelConfig
from llmkit.errors import ConfigError, LlmkitError
from llmkit.processes import die_with_parent
from llmkit.serving.console import fact
from llmkit.serving.merging import merged_directory
from llmkit.serving.servable import why_merged
from llmkit.serving.target import Target


def merged_where_needed(
    targets: dict[str, Target], wanted: str, overrides: Sequence[str], *, dry_run: bool
) -> dict[str, Target]:
    """The targets, those that vLLM does not serve as they are replaced by their merged models, which are made now.

    Args:
        wanted: `serve.adapter`.
        overrides: what the command line says of merging and of buckets, for the process that merges.

    Raises ConfigError if one of several needs it: merged models share no base.
    """
    reasons = {name: why for name, target in targets.items() if (why := why_merged(target, wanted))}
    if reasons and len(targets) > 1:
        name, why = next(iter(reasons.items()))
        raise ConfigError(
            f"serve.all=true: {name} would have to be merged ({why}), and merged models share no base. Serve it alone, "
            f"with run= or sweep=; or, if the difference is small enough, all with serve.adapter=unmerged."
        )
    for name, why in reasons.items():
        fact("merged", f"{name}: {why}, so it is merged into its base{' (not now: dry_run)' if dry_run else ''}")
        if not dry_run:
            _merge(targets[name], overrides)
    return {name: _merged(target) if name in reasons else target for name, target in targets.items()}


def _merge(target: Target, overrides: Sequence[str]) -> None:
    """In a child: what torch takes of the memory is free again before vLLM starts."""
    parent = os.getpid()

    def in_child() -> None:
        if not die_with_parent(parent, signal.SIGTERM):
            os._exit(1)

    command = [sys.executable, "-m", "llmkit.export", target.said, "merge=true", *overrides]
    with subprocess.Popen(command, preexec_fn=in_child) as child:  # no thread has been started yet
        code = child.wait()
    if code:
        raise LlmkitError(f"{target.said}: could not be merged, see above; it is not served.")


def _merged(target: Target) -> Target:
    directory = merged_directory(target)
    base = ModelConfig(path=str(directory), trust_remote_code=target.base.trust_remote_code)
    return replace(target, source=str(directory), adapter=None, base=base, is_partial=False)
