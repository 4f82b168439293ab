"""Where llmkit keeps things: the user's cache directory now, run directories elsewhere than on this disk later."""

from llmkit.storage.cache import build_once, cache_dir

__all__ = ["build_once", "cache_dir"]
