"""The versions a run was made with."""

import functools
import platform
from importlib import metadata

PACKAGES = ("llmkit", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed")


@functools.cache
def versions() -> dict[str, str]:
    """Package -> version, for those installed; a bare checkout's llmkit is the one in the source."""
    from llmkit import __version__

    found = {"python": platform.python_version(), "llmkit": __version__}
    for package in PACKAGES[1:]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
