"""A proxy between a client and an HTTP server that does to requests and responses what networks and servers do.

    with FaultProxy(server.endpoint) as proxy:
        proxy.faults = [Unavailable(times=2)]
        ... use proxy.endpoint ...

Each request is given to the faults in turn; the first that applies decides. `proxy.requests` lists what was asked.
"""

import http.client
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit


@dataclass(kw_only=True)
class Fault:
    """What happens to requests with the method `method` whose path holds `path`, `times` times (None: always)."""

    method: str = ""
    path: str = ""
    times: int | None = 1
    after: int = 0  # how many such requests pass first

    def applies(self, method: str, path: str) -> bool:
        if self.times == 0 or self.method not in ("", method) or self.path not in path:
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(kw_only=True)
class Answer(Fault):
    """The proxy answers itself; the server hears nothing."""

    status: int
    code: str = ""
    body: bytes | None = None

    def content(self) -> bytes:
        return self.body if self.body is not None else b"<Error><Code>%s</Code></Error>" % self.code.encode()


def unavailable(times: int | None = 1, **of: str) -> Answer:
    return Answer(status=503, code="SlowDown", times=times, **of)


def denied(**of: str) -> Answer:
    return Answer(status=403, code="AccessDenied", times=None, **of)


@dataclass(kw_only=True)
class Cut(Fault):
    """The connection ends after so many bytes of the response's body."""

    after_bytes: int


@dataclass(kw_only=True)
class CutRequest(Fault):
    """The connection ends after so many bytes of the request's body, and the server hears nothing."""

    after_bytes: int


@dataclass(kw_only=True)
class Flip(Fault):
    """One bit of the response's body, `at` bytes from its beginning, is another."""

    at: int


@dataclass(kw_only=True)
class FlipRequest(Fault):
    """One bit of the request's body, `at` bytes from its beginning, is another."""

    at: int


@dataclass(kw_only=True)
class Replace(Fault):
    """Bytes in the response's body are replaced."""

    old: bytes
    new: bytes


@dataclass(kw_only=True)
class Delay(Fault):
    """The answer comes later, or with many `seconds` never: a black hole."""

    seconds: float


@dataclass(kw_only=True)
class Slow(Fault):
    """The response's body comes at so many bytes a second."""

    bytes_per_second: float


@dataclass(kw_only=True)
class LoseAnswer(Fault):
    """The server does what it is asked, and the connection ends before it can say so."""


class FaultProxy:
    """Passes requests on to `upstream` (http://HOST:PORT), except where a fault applies."""

    def __init__(self, upstream: str, faults: Sequence[Fault] = ()):
        self.upstream, self.faults = urlsplit(upstream).netloc, list(faults)
        self.requests: list[tuple[str, str]] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False  # one that plays a black hole would be waited for
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, path: str = "") -> int:
        """How many such requests there were."""
        return sum(one == method and path in where for one, where in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            return next((fault for fault in self.faults if fault.applies(method, path)), None)


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def _pass(self) -> None:
        fault = self.proxy.fault_for(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if isinstance(fault, CutRequest):
            self.rfile.read(min(length, fault.after_bytes))
            self.close_connection = True
            return
        body = bytearray(self.rfile.read(length))
        if isinstance(fault, FlipRequest):
            body[fault.at] ^= 1
        if isinstance(fault, Delay) and self.proxy.stopped.wait(fault.seconds):
            self.close_connection = True
            return
        if isinstance(fault, Answer):
            self._answer(fault.status, [("Content-Type", "application/xml")], fault.content(), None)
            return
        status, headers, content = self._ask(bytes(body))
        if isinstance(fault, LoseAnswer):
            self.close_connection = True
            return
        self._answer(status, headers, content, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: Fault | None) -> None:
        if isinstance(fault, Replace):
            content = content.replace(fault.old, fault.new)
        if isinstance(fault, Flip):
            content = content[: fault.at] + bytes([content[fault.at] ^ 1]) + content[fault.at + 1 :]
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        given = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", given if self.command == "HEAD" and given else str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(fault, Cut):
            content = content[: fault.after_bytes]
            self.close_connection = True
        try:
            self._send(content, fault.bytes_per_second if isinstance(fault, Slow) else None)
        except OSError:  # the client has gone
            self.close_connection = True

    def _send(self, content: bytes, bytes_per_second: float | None) -> None:
        if bytes_per_second is None:
            self.wfile.write(content)
            return
        step = max(1, int(bytes_per_second / 20))
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            time.sleep(step / bytes_per_second)

    def log_message(self, *_: object) -> None:
        pass
