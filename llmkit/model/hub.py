"""A model's repository on the hub at one commit: which files it has, what they must hash to, and how they come here."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llmkit.config.schema import ModelConfig
from llmkit.errors import LlmkitError
from llmkit.model.files import INDEX, is_weights
from llmkit.model.source import explained

SHA256_DIGITS = 64
BLOCK = 2**20  # bytes read at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository. `digest` is the hub's: the SHA-256 of a large file, git's SHA-1 of a small one."""

    name: str
    size: int  # bytes
    digest: str

    def hashes(self, path: Path) -> tuple[str, str]:
        """The digest of the file at `path`, of this one's kind, and its SHA-256."""
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        by_git = len(self.digest) != SHA256_DIGITS
        with path.open("rb") as content:
            while block := content.read(BLOCK):
                sha256.update(block)
                if by_git:
                    git.update(block)
        return (git if by_git else sha256).hexdigest(), sha256.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A repository at a commit."""

    hub_id: str
    revision: str
    commit: str
    files: dict[str, HubFile]
    offline: bool  # the hub could not be reached: `files` are those in its cache on this machine

    def cached(self, file: HubFile) -> Path | None:
        """The file in the Hugging Face cache, whatever commit it came with; whether it is whole is not checked."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=self.hub_id, repo_type="model")
        blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / file.digest
        return blob if blob.is_file() and blob.stat().st_size == file.size else None

    def obtain(self, file: HubFile, scratch: Path, arrived: Callable[[int], None]) -> tuple[Path, str]:
        """The file on this machine, in the Hugging Face cache or below `scratch`, and its SHA-256; it is verified.

        Args:
            arrived: called with the bytes of each piece that comes.

        Raises:
            LlmkitError: the connection breaks, or the hub sends other content than it says it has.
            OSError: the disk fails, or the hub refuses.
        """
        if path := self.cached(file):
            digest, sha256 = file.hashes(path)
            if digest == file.digest:
                arrived(file.size)
                return path, sha256
        for _ in range(2):
            path = self._download(file, scratch, arrived)
            digest, sha256 = file.hashes(path)
            if digest == file.digest:
                return path, sha256
            path.unlink()
            arrived(-file.size)
        raise LlmkitError(
            f"{self.hub_id}, {file.name}: what comes is not what the hub says it has (its hash is {digest}, but should "
            f"be {file.digest}), twice. Check the network and HF_ENDPOINT."
        )

    def _download(self, file: HubFile, scratch: Path, arrived: Callable[[int], None]) -> Path:
        import httpx2
        from huggingface_hub import errors, hf_hub_download

        bar: Any = type("Bar", (_Counter,), {"arrived": staticmethod(arrived)})
        # Not with the cache of this machine: the file would be taken from there, where it is damaged if it is there.
        none = scratch / ".cache" / "none"
        try:
            path = hf_hub_download(
                self.hub_id, file.name, revision=self.commit, local_dir=scratch, cache_dir=none, tqdm_class=bar
            )
            return Path(path)
        except (httpx2.HTTPError, errors.LocalEntryNotFoundError, RuntimeError) as error:  # RuntimeError: Xet's
            if isinstance(error, errors.RepositoryNotFoundError):
                raise
            reason = str(error.__cause__ or error).strip().splitlines()
            raise LlmkitError(
                f"{self.hub_id}, {file.name}: cannot be fetched ({reason[0] if reason else type(error).__name__}); the "
                "same command goes on with what is missing."
            ) from error


def look_up(config: ModelConfig) -> HubModel:
    """The repository of a hub model at the commit that its revision stands for now.

    Where the hub cannot be reached, it is what the Hugging Face cache has of it. Raises ConfigError if there is no such
    model or revision, or nothing of it can be had.
    """
    import httpx2
    from huggingface_hub import HfApi, errors

    assert config.hub_id
    revision = config.commit or config.revision
    with explained(config):
        try:
            info = HfApi().model_info(config.hub_id, revision=revision, files_metadata=True)
        except (httpx2.TransportError, errors.OfflineModeIsEnabled) as error:
            if found := _in_cache(config.hub_id, revision):
                return found
            raise errors.LocalEntryNotFoundError(str(error)) from error
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500 or not (found := _in_cache(config.hub_id, revision)):
                raise
            return found
    files = {
        one.rfilename: HubFile(
            name=one.rfilename,
            size=one.lfs.size if one.lfs else one.size or 0,
            digest=one.lfs.sha256 if one.lfs else str(one.blob_id),
        )
        for one in info.siblings or ()
    }
    return HubModel(hub_id=config.hub_id, revision=config.revision, commit=str(info.sha), files=files, offline=False)


def _in_cache(hub_id: str, revision: str) -> HubModel | None:
    """What the Hugging Face cache holds of a model, if all of its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    if not isinstance(known, str):
        return None
    snapshot = Path(known).parent
    # A file of a snapshot is a link to one that is named by its digest.
    files = {
        name: HubFile(name=name, size=path.stat().st_size, digest=path.resolve().name)
        for path in sorted(snapshot.rglob("*"))
        if path.is_file() and (name := path.relative_to(snapshot).as_posix())
    }
    if INDEX in files:
        parts = set(json.loads((snapshot / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    else:
        parts = {name for name in files if is_weights(name)}
    if not parts or not parts <= files.keys():
        return None
    return HubModel(hub_id=hub_id, revision=revision, commit=snapshot.name, files=files, offline=True)


class _Counter:
    """Stands where the hub's client wants a progress bar of tqdm's, and only tells of the bytes."""

    arrived: Callable[[int], None]
    n = 0

    def __init__(self, *, total: float | None = None, **_: Any):
        self.total = total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def update(self, count: float = 1) -> None:
        self.arrived(int(count))

    def update_transfer(self, count: float) -> None:
        """Of Xet's two bars this one counts what comes over the network, compressed; the other what is in the file."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Shown nowhere."""

    set_transfer_postfix_str = set_postfix_str

    def close(self) -> None:
        """Nothing to close."""
