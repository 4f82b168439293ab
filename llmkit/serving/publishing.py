"""What a run has made, at another place: beside its records in a directory or a bucket, or as a model on the hub.

    publish_merged(open_place("s3://bucket/runs/alpha", config.storage), Path("runs/alpha"), Path("runs/alpha/merged"))
    publish_to_hub(Path("runs/alpha/merged"), HubAddress("org", "name"), public=False, say=print)

A copy's `files.json` lists what is in it, with size and SHA-256 of each file; it is written last.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llmkit import durable, rundir
from llmkit.byte_progress import byte_progress, in_bytes
from llmkit.errors import ConfigError, LlmkitError
from llmkit.storage import Place, upload_files
from llmkit.training.checkpoints import manifest
from llmkit.training.checkpoints.remote import RemoteRun

HUB = "hub://"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
OURS = "llmkit"  # among the tags of a model card: the model was put there by this module
CARD = "README.md"
# Files that may name directories and buckets: of the base, the data, an earlier run.
NAMING = ("adapter_config.json", "merge.json", "parity.json")
PLACE = re.compile(r"(?:/|~/|s3://).+")

Say = Callable[[str], None]


class PublishError(LlmkitError):
    """The hub has refused, or not answered."""


class HubAddress(NamedTuple):
    """A model repository of the hub."""

    owner: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.owner}/{self.name}"


def hub_address(to: str) -> HubAddress:
    """The repository that `hub://org/name` names. Raises ConfigError if it is not well formed."""
    owner, _, name = to.removeprefix(HUB).rstrip("/").partition("/")
    if not (HUB_NAME.fullmatch(owner) and HUB_NAME.fullmatch(name)) or "--" in name or ".." in name:
        raise ConfigError(f"to={to}: write hub://ORG/NAME, in letters, digits, '-', '_' and '.'.")
    return HubAddress(owner, name)


def publish_merged(place: Place, run_dir: Path, merged: Path) -> None:
    """Bring a merged model, and the records of its run if `run_dir` is one, to `place`; result.json comes last.

    What is there already with the same content is not sent again. Raises StorageError.
    """
    place.delete([rundir.RESULT])
    target, listing = place.place(merged.name), f"{merged.name}.json"
    hashes = {path.name: durable.sha256_of(path) for path in sorted(merged.iterdir())}
    there, known = target.files(), json.loads(place.read(listing) or b"{}")
    missing = [name for name in hashes if name not in there or known.get(name) != hashes[name]]
    size = sum((merged / name).stat().st_size for name in missing)
    with byte_progress(f"sending {merged}", size) as progress:
        upload_files(target, merged, missing, hashes=hashes, progress=progress)
    target.delete((there.keys() & known.keys()) - hashes.keys())  # of an earlier model of this run
    place.write(listing, json.dumps(hashes, indent=2).encode())
    if (run_dir / rundir.CONFIG).is_file():
        RemoteRun(place).send_records(run_dir)
    if (run_dir / rundir.RESULT).is_file():
        place.write(rundir.RESULT, (run_dir / rundir.RESULT).read_bytes())


def begin_file_list(place: Place, run_dir: Path) -> None:
    """Say, before anything else is sent, which model the place is for; nothing is vouched for until the end."""
    _write_list(place, run_dir, {})


def listed_model(place: Place) -> str | None:
    """Which model the place is for: the name of its directory; None if its files.json does not say."""
    return json.loads(place.read(rundir.FILES) or b"{}").get("model")


def write_file_list(place: Place, run_dir: Path) -> None:
    """Write `files.json`: what the place holds of `run_dir`, with size in bytes and SHA-256 of each file.

    The digests of models and checkpoints are those that were verified when they were sent.
    """
    known, listed = dict(_digests(place, run_dir)), {}
    for name, entry in place.files().items():
        digest = known.get(name)
        if digest is None and (run_dir / name).is_file():
            digest = durable.sha256_of(run_dir / name)
        if digest is not None:
            listed[name] = {"size": entry.size, "sha256": digest}
    _write_list(place, run_dir, listed)


def _write_list(place: Place, run_dir: Path, files: dict[str, Any]) -> None:
    content = {"model": run_dir.absolute().name, "files": files}
    place.write(rundir.FILES, (json.dumps(content, indent=2) + "\n").encode())


def _digests(place: Place, run_dir: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of the files of models and checkpoints."""
    for name in place.files():
        folder, _, file = name.rpartition("/")
        if not folder and (f"{rundir.FINAL}.json" == file or re.fullmatch(r"merged.*\.json", file)):
            for one, digest in json.loads(place.read(name) or b"{}").items():
                yield f"{file.removesuffix('.json')}/{one}", digest
        elif file == manifest.MANIFEST and (run_dir / name).is_file():
            for one, about in manifest.read_manifest(run_dir / folder)["files"].items():
                yield f"{folder}/{one}", about["sha256"]


def publish_to_hub(directory: Path, to: HubAddress, *, public: bool, say: Say) -> str:
    """Make the files of `directory` those of a model repository, which is made if it is not there; returns its address.

    Only files at the top of `directory` go there; what is listed beforehand is what is sent. The token is taken from
    HF_TOKEN alone. Of directories and buckets that the model card names, only the last part is told.

    Args:
        public: whether everybody may see it. A public repository is never written to without it.
        say: told what will be sent, a line at a time.

    Raises:
        PublishError: with what the hub says, and what helps.
    """
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not token:
        raise PublishError(
            f"to={HUB}{to.id}: set HF_TOKEN to a token that may write to {to.owner} (its page on the hub)."
        )
    files = contents(directory)
    _list(files, to, public, say)
    with _refusals_explained(to):
        return _Hub(to, token).put(files, public=public)


def contents(directory: Path) -> dict[str, Path | bytes]:
    """The files of a model's directory; of those that name places of this user, the content that is sent instead."""
    found: dict[str, Path | bytes] = {}
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        found[path.name] = path
        if path.name == CARD:
            found[path.name] = _card_without_places(path.read_text(encoding="utf-8")).encode()
        elif path.name in NAMING:
            plain = _without_places(json.loads(path.read_text(encoding="utf-8")))
            found[path.name] = (json.dumps(plain, indent=2) + "\n").encode()
    return found


def _card_without_places(text: str) -> str:
    text = re.sub(rf"^base_model: {PLACE.pattern}\n", "", text, count=1, flags=re.MULTILINE)  # no model of the hub
    return re.sub(rf"`({PLACE.pattern}?)`", lambda found: f"`{_last_part(found[1])}`", text)


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return _last_part(value) if isinstance(value, str) and PLACE.fullmatch(value) else value


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _list(files: dict[str, Path | bytes], to: HubAddress, public: bool, say: Say) -> None:
    sizes = {name: one.stat().st_size if isinstance(one, Path) else len(one) for name, one in files.items()}
    width = max(map(len, sizes))
    say(f"{HUB}{to.id} ({'public' if public else 'private'}) gets {len(files)} files, {in_bytes(sum(sizes.values()))}:")
    for name, size in sizes.items():
        say(f"  {name:<{width}}  {in_bytes(size)}")


class _Hub:
    """A repository, through huggingface_hub."""

    def __init__(self, to: HubAddress, token: str):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.to, self.api = to, HfApi(token=token, library_name="llmkit")

    def put(self, files: dict[str, Path | bytes], *, public: bool) -> str:
        """Make `files` all that the repository holds, in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        stale = self._take(public=public) - files.keys()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=one) for name, one in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale)),
        ]
        self.api.create_commit(self.to.id, operations, commit_message="Upload by llmkit export")
        return f"{self.api.endpoint}/{self.to.id}"

    def _take(self, *, public: bool) -> set[str]:
        """Make the repository, or look whether the one that is there is ours to change; returns what it holds."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.create_repo(self.to.id, private=not public)
            return set()
        except HfHubHTTPError as error:
            if error.response.status_code != 409:  # it exists
                raise
        info = self.api.model_info(self.to.id)
        names = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
        if names and OURS not in (info.tags or []):
            raise ConfigError(
                f"to={HUB}{self.to.id}: the name is taken: the repository there holds {sorted(names)[0]}, which llmkit "
                "did not put there; choose another name."
            )
        if not info.private and not public:
            raise ConfigError(
                f"to={HUB}{self.to.id}: the repository there is public; public=true updates it, another name makes a "
                "private one."
            )
        if info.private and public:
            raise ConfigError(
                f"to={HUB}{self.to.id}: the repository there is private; leave public=true out, or change it on its "
                "page on the hub."
            )
        return names


@contextmanager
def _refusals_explained(to: HubAddress) -> Iterator[None]:
    """One message for whatever the hub, or the way to it, does."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise PublishError(f"to={HUB}{to.id}: HF_HUB_OFFLINE is set; unset it to reach the hub.") from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of one file, and Xet's
        refused = next((one for one in (error, error.__cause__) if isinstance(one, errors.HfHubHTTPError)), None)
        if refused is None:
            raise PublishError(f"to={HUB}{to.id}: {_first_line(error)} The same command tries again.") from error
        said = refused.server_message or refused
        status = refused.response.status_code if refused.response is not None else None
        raise PublishError(f"to={HUB}{to.id}: {_refusal(to, status)} The hub says: {_first_line(said)}") from error


def _refusal(to: HubAddress, status: int | None) -> str:
    return {
        401: "the token in HF_TOKEN is not valid, or has expired: make one that may write.",
        402: f"the storage of {to.owner} is full.",
        403: f"the token in HF_TOKEN may not write to {to.owner}: give it the right to, or choose another name.",
        404: f"there is no {to.owner}, or the token in HF_TOKEN may not see it.",
        413: f"the storage of {to.owner} is full, or a file is too large: export.max_shard_gb makes smaller ones.",
        429: "too many requests for now; the same command tries again.",
    }.get(status or 0, "it was not taken; the same command tries again.")


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
