"""A Hugging Face hub on this machine: serves directories as models or data sets, and refuses as the hub does.

Like the hub it keeps weights as large files (LFS), whose digest is a SHA-256, and others as git does.

    with FakeHub({"org/tiny": directory, "datasets/org/rows": directory}, gated={"org/gated"}) as hub:
        subprocess.run(..., env=os.environ | hub.environment(tmp_path / "hf-home"))

A process reads HF_ENDPOINT when it imports huggingface_hub, so whoever is to use this hub is a process of its own.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # what `main` of every repository stands for


class FakeHub:
    """A hub that holds `models` (id -> directory); those named in `gated` ask for a token, and any will do.

    A data set's id begins with `datasets/`, as on the hub.

    `requests` lists what was asked for: ("HEAD", "/org/tiny/resolve/main/config.json"), ... `commit` is the one that
    `main` stands for. What goes wrong, by the name of the file: `damaged` is sent with a byte changed, of `lost` the
    connection breaks half-way, each as often as its number says; `held` comes after so many seconds.
    """

    def __init__(self, models: Mapping[str, Path], gated: Set[str] = frozenset()):
        self.models, self.gated = models, gated
        self.requests: list[tuple[str, str]] = []
        self.damaged: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self.held: dict[str, float] = {}
        self.commit = COMMIT
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloads(self, name: str) -> int:
        """How often the file `name` was asked for as a whole."""
        return sum(command == "GET" and path.endswith(f"/{name}") for command, path in self.requests)

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to use this hub, with its cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        words = path.strip("/").removeprefix("api/").removeprefix("models/").split("/")
        folder = "datasets/" if words[0] == "datasets" else ""
        org, name, *rest = [*words[bool(folder) :], ""]
        # resolve/REVISION/FILE, or of the API: revision/REVISION, tree/REVISION/FOLDER, paths-info/REVISION, or none.
        kind, revision, *inside = [*rest, "", ""]
        model, wanted = f"{folder}{org}/{name}", "/".join(inside).strip("/")
        if model in self.hub.gated and "Authorization" not in self.headers:
            self._refuse(401, "GatedRepo", f"Access to model {model} is restricted. Please log in.")
        elif model not in self.hub.models:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        elif revision not in ("", "main", self.hub.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif kind == "resolve":
            self._file(self.hub.models[model] / wanted)
        elif kind == "tree" and wanted and not (self.hub.models[model] / wanted).is_dir():
            self._refuse(404, "EntryNotFound", f"{wanted} does not exist")
        elif kind == "tree":
            self._json(
                [_entry(self.hub.models[model], path) for path in sorted((self.hub.models[model] / wanted).rglob("*"))]
            )
        elif kind == "paths-info":
            names = parse_qs(asked.decode()).get("paths", []) if asked[:1] != b"{" else json.loads(asked)["paths"]
            paths = [self.hub.models[model] / name for name in names]
            self._json([_entry(self.hub.models[model], path) for path in paths if path.exists()])
        else:
            self._facts(model)

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": self.hub.commit, "X-Linked-Size": str(len(content))}
        if self.command == "GET":
            time.sleep(self.hub.held.get(file.name, 0.0))
        if self.command == "GET" and self.hub.damaged.get(file.name, 0):
            self.hub.damaged[file.name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.command == "GET" and self.hub.lost.get(file.name, 0):
            self.hub.lost[file.name] -= 1
            self._send(200, content[: len(content) // 2], headers | {"Content-Length": str(len(content))})
            self.close_connection = True
            return
        self._send(200, content, headers)

    def _facts(self, model: str) -> None:
        root = self.hub.models[model]
        files = [_sibling(root, file) for file in sorted(root.rglob("*")) if file.is_file()]
        self._json({"id": model.removeprefix("datasets/"), "sha": self.hub.commit, "siblings": files})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": self.hub.commit})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: `requests` keeps them."""


def _is_large(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin")


def _digest(file: Path) -> str:
    """The SHA-256 of a large file, git's SHA-1 of another."""
    content = file.read_bytes()
    if _is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(root: Path, file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    facts = {"rfilename": file.relative_to(root).as_posix(), "size": size, "blobId": _digest(file)[:40]}
    return facts | ({"lfs": {"sha256": _digest(file), "size": size, "pointerSize": 134}} if _is_large(file) else {})


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": COMMIT}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)[:40]}
