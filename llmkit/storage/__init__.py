"""Where llmkit keeps things: the user's cache directory, and places on this machine or in buckets."""

from llmkit.storage.cache import build_once, cache_dir
from llmkit.storage.errors import StorageError
from llmkit.storage.places import Entry, Place, is_remote, open_place, storage_problems
from llmkit.storage.transfers import download_files, upload_files

__all__ = [
    "Entry",
    "Place",
    "StorageError",
    "build_once",
    "cache_dir",
    "download_files",
    "is_remote",
    "open_place",
    "storage_problems",
    "upload_files",
]
