"""A Hugging Face hub on this machine: serves directories as models or data sets, and refuses as the hub does.

Like the hub it keeps weights as large files (LFS), whose digest is a SHA-256, and others as git does.

    with FakeHub({"org/tiny": directory, "datasets/org/rows": directory}, gated={"org/gated"}) as hub:
        subprocess.run(..., env=os.environ | hub.environment(tmp_path / "hf-home"))

With `uploads` it also takes models, from whoever has its TOKEN: into that directory, in commits, as the hub does.

A process reads HF_ENDPOINT when it imports huggingface_hub, so whoever is to use this hub is a process of its own.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping, Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_org"  # may write to the owner `org`
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # what `main` of every repository stands for


class FakeHub:
    """A hub that holds `models` (id -> directory); those named in `gated` ask for a token, and any will do.

    A data set's id begins with `datasets/`, as on the hub.

    `requests` lists what was asked for: ("HEAD", "/org/tiny/resolve/main/config.json"), ... `commit` is the one that
    `main` stands for. What goes wrong, by the name of the file: `damaged` is sent with a byte changed, of `lost` the
    connection breaks half-way, each as often as its number says; `held` comes after so many seconds.

    Of what is uploaded, `private` are the ids of repositories that only their owner sees, `commits` how many each has
    had, and `refused` the status and the words for one kind of request (create, preupload, batch, put, commit).
    """

    def __init__(self, models: Mapping[str, Path], gated: Set[str] = frozenset(), *, uploads: Path | None = None):
        self.models, self.gated, self.uploads = dict(models), gated, uploads
        self.private: set[str] = set()
        self.commits: dict[str, int] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.blobs: dict[str, bytes] = {}  # by their SHA-256
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

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.uploads is not None and self._takes_upload(path, asked):
            return
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

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _takes_upload(self, path: str, asked: bytes) -> bool:
        """Answer a request that belongs to an upload; False for any other."""
        routes = {
            "create": r"/api/repos/create",
            "card": r"/api/validate-yaml",
            "preupload": r"/api/models/(.+)/preupload/main",
            "batch": r"/(.+)\.git/info/lfs/objects/batch",
            "put": r"/lfs/(\w{64})",
            "commit": r"/api/models/(.+)/commit/main",
        }
        found = ((kind, match) for kind, route in routes.items() if (match := re.fullmatch(route, path)))
        kind, match = next(found, ("", None))
        if match is None or self.command not in ("POST", "PUT"):
            return False
        if kind in self.hub.refused:
            status, message = self.hub.refused[kind]
            self._refuse(status, "", message)
        elif kind != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        else:
            getattr(self, f"_{kind}")(asked, *match.groups())
        return True

    def _create(self, asked: bytes) -> None:
        wanted = json.loads(asked)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.models:
            self._refuse(409, "", "You already created this model repo")
        elif wanted["organization"] != "org":
            self._refuse(403, "", f'You don\'t have the rights to create a model under the namespace "{name}"')
        else:
            assert self.hub.uploads is not None
            self.hub.models[name] = self.hub.uploads / name
            self.hub.models[name].mkdir(parents=True)
            if wanted.get("visibility") == "private" or wanted.get("private"):
                self.hub.private.add(name)
            self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def _card(self, asked: bytes) -> None:
        base = re.search(r"^base_model: (.+)$", json.loads(asked)["content"], flags=re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1]):
            errors = [{"message": f'"base_model" with value "{base[1]}" is not valid. Use a model id.'}]
            self._send(400, json.dumps({"errors": errors}).encode(), {"Content-Type": "application/json"})
        else:
            self._json({"errors": [], "warnings": []})

    def _preupload(self, asked: bytes, model: str) -> None:
        answers = []
        for file in json.loads(asked)["files"]:
            there = self.hub.models[model] / file["path"]
            answer = {"path": file["path"], "uploadMode": "lfs" if _is_large(there) else "regular"}
            answers.append(answer | {"shouldIgnore": False, "oid": _digest(there) if there.exists() else None})
        self._json({"files": answers})

    def _batch(self, asked: bytes, model: str) -> None:
        objects = []
        for one in json.loads(asked)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            objects.append(one | ({} if one["oid"] in self.hub.blobs else {"actions": action}))
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, asked: bytes, oid: str) -> None:
        assert hashlib.sha256(asked).hexdigest() == oid
        self.hub.blobs[oid] = asked
        self._send(200, b"", {})

    def _commit(self, asked: bytes, model: str) -> None:
        root = self.hub.models[model]
        for line in asked.splitlines():
            one = json.loads(line)
            file = root / one["value"].get("path", "")
            if one["key"] == "file":
                file.write_bytes(base64.b64decode(one["value"]["content"]))
            elif one["key"] == "lfsFile":
                file.write_bytes(self.hub.blobs[one["value"]["oid"]])
            elif one["key"] == "deletedFile":
                file.unlink()
        self.hub.commits[model] = self.hub.commits.get(model, 0) + 1
        self._json({"commitUrl": f"{self.hub.url}/{model}/commit/{self.hub.commit}", "commitOid": self.hub.commit})

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
        card = root / "README.md"
        tags = re.search(r"^tags: \[(.*)\]$", card.read_text() if card.exists() else "", flags=re.MULTILINE)
        facts = {"id": model.removeprefix("datasets/"), "sha": self.hub.commit, "siblings": files}
        self._json(facts | {"private": model in self.hub.private, "tags": tags[1].split(", ") if tags else []})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": self.hub.commit})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
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
