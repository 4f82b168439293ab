"""Addresses of places, and names of files in them: which are well formed, and which would lead out of the place."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from llmkit.errors import ConfigError
from llmkit.storage.errors import StorageError

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html; capitals and _: old buckets.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_DRIVE = re.compile(r"[A-Za-z]:")


class Address(NamedTuple):
    """What an `s3://bucket/prefix` names; the prefix has no slash at either end and may be empty."""

    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return "/".join(("s3:/", *filter(None, self)))


def is_remote(place: str) -> bool:
    """Whether `place` is in a bucket. Raises ConfigError for a URL that is not `s3://`."""
    if place.startswith("s3:") and not place.startswith("s3://"):
        raise ConfigError(
            f"{place}: an address in a bucket begins with s3://; did you mean s3://{place[3:].lstrip('/')}?"
        )
    match = _SCHEME.match(place)
    if match and match["scheme"] != "s3":
        raise ConfigError(f"{place}: llmkit keeps files on this machine or in s3://BUCKET/PATH, not in {match[0]}")
    return bool(match)


def storage_problems(place: str) -> list[str]:
    """What is wrong with an address, one sentence each; a path on this machine has nothing wrong with it."""
    try:
        if not is_remote(place):
            return []
    except ConfigError as error:
        return error.problems
    bucket, _, key = place.removeprefix("s3://").partition("/")
    if not bucket:
        return [f"{place}: the name of the bucket is missing; write s3://BUCKET/PATH."]
    problems = []
    if not _BUCKET.fullmatch(bucket):
        problems.append(
            f"{place}: '{bucket}' is not a bucket's name (3 to 63 letters, digits, dots and hyphens); "
            "write s3://BUCKET/PATH."
        )
    if key.strip("/") and (flaw := flaw_of_name(key.strip("/"))):
        problems.append(f"{place}: the path {flaw}.")
    return problems


def address_of(place: str) -> Address:
    """The bucket and the prefix that an `s3://` URL names. Raises ConfigError if it is not well formed."""
    if problems := storage_problems(place):
        raise ConfigError(*problems)
    bucket, _, key = place.removeprefix("s3://").partition("/")
    return Address(bucket, key.strip("/"))


def flaw_of_name(name: str) -> str:
    """Why `name` is no plain, relative, `/`-separated name of a file, in words that follow "it"; empty if it is one."""
    parts = name.split("/")
    if name.startswith("/"):
        return "begins with '/'"
    if ".." in parts or "." in parts:
        return "contains '.' or '..' as a directory"
    if "" in parts:
        return "is empty or contains an empty directory name ('//')"
    if "\\" in name:
        return "contains a backslash"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "contains a control character"
    if _DRIVE.match(name):
        return "begins with a drive letter"
    if max(len(os.fsencode(part)) for part in parts) > 255:
        return "has a part longer than 255 bytes"
    return ""


def check_names(names: list[str], url: str) -> None:
    """Raise StorageError unless all `names` can be files below one directory, whatever the place at `url` listed."""
    for name in names:
        if flaw := flaw_of_name(name):
            raise StorageError(f"{url} holds {name!r}, which is not fetched: the name {flaw}.")
    files = set(names)
    for name in names:
        above = name.rpartition("/")[0]
        while above:
            if above in files:
                raise StorageError(
                    f"{url} holds both '{above}' and '{name}': one name cannot be a file and a directory."
                )
            above = above.rpartition("/")[0]


def inside(directory: Path, name: str, url: str) -> Path:
    """The path of `name` below `directory`. Raises StorageError if it would lie outside, also through a link."""
    check_names([name], url)
    path = directory / name
    folder = path.parent
    while folder != directory:
        if folder.is_symlink():
            raise StorageError(f"{url} holds '{name}', but {folder} is a link: nothing is written through it.")
        folder = folder.parent
    return path
