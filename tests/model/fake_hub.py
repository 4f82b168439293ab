"""A Hugging Face hub on this machine: serves directories as models, and answers as the hub does when it refuses.

    with FakeHub({"org/tiny": directory}, gated={"org/gated"}) as hub:
        subprocess.run(..., env=os.environ | hub.environment(tmp_path / "hf-home"))

A process reads HF_ENDPOINT when it imports huggingface_hub, so whoever is to use this hub is a process of its own.
"""

import hashlib
import json
from collections.abc import Mapping, Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # what `main` of every model stands for


class FakeHub:
    """A hub that holds `models` (id -> directory); those named in `gated` ask for a token, and any will do.

    `requests` lists what was asked for: ("HEAD", "/org/tiny/resolve/main/config.json"), ...
    """

    def __init__(self, models: Mapping[str, Path], gated: Set[str] = frozenset()):
        self.models, self.gated = models, gated
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to use this hub, with its cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        org, name, *rest = words[2:] if api else words
        # resolve/REVISION/FILE, or of the API: revision/REVISION, tree/REVISION/FOLDER, or nothing.
        kind, revision, *inside = [*rest, "", ""] if len(rest) < 2 else rest
        model, wanted = f"{org}/{name}", "/".join(inside)
        if model in self.hub.gated and "Authorization" not in self.headers:
            self._refuse(401, "GatedRepo", f"Access to model {model} is restricted. Please log in.")
        elif model not in self.hub.models:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        elif revision not in ("", "main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif kind == "resolve":
            self._file(self.hub.models[model] / wanted)
        elif kind == "tree" and wanted:
            self._refuse(404, "EntryNotFound", f"{wanted} does not exist")
        else:
            self._facts(model, kind)

    def _file(self, file: Path) -> None:
        if file.is_file():
            content = file.read_bytes()
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self._refuse(404, "EntryNotFound", "Entry not found")

    def _facts(self, model: str, kind: str) -> None:
        files = sorted(file for file in self.hub.models[model].iterdir() if file.is_file())
        if kind == "tree":
            self._json([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files])
        else:
            self._json({"id": model, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: `requests` keeps them."""
