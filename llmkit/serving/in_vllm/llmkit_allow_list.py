"""Only the routes a client needs, and each but the probes with the key: an ASGI middleware for vLLM's `--middleware`.

vLLM 0.32 asks for its key below /v1 and /v2 only: /invocations generates, and /scale_elastic_ep restarts, for anybody
who reaches the port. Whatever is not listed here is not found. Imported by vLLM, perhaps in an environment without
llmkit: this file needs nothing but the standard library.
"""

import hmac
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

PROBES = re.compile(r"/(health|metrics)")  # asked by what watches a server, without a key
CLIENT = re.compile(
    r"/(version|tokenize|detokenize|v1/(models(/.+)?|completions|embeddings|messages(/count_tokens)?"
    r"|chat/completions(/batch)?|responses(/[\w-]+(/cancel)?)?))"
)

Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class AllowList:
    """Stands in front of all that vLLM mounts, its own check of the key included."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.key = os.environ.get("VLLM_API_KEY", "").encode()
        self.mark = (b"x-llmkit-server", os.environ.get("LLMKIT_SERVER", "").encode())

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # websockets: no route of ours
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] == "GET" and PROBES.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
        elif not CLIENT.fullmatch(scope["path"]):
            await _refuse(send, 404, b'{"error": "not found"}')
        elif scope["method"] != "OPTIONS" and not self._has_key(scope):  # a browser asks OPTIONS before it has a say
            await _refuse(send, 401, b'{"error": "unauthorized"}')
        elif scope["path"] == "/v1/models":  # by the mark llmkit knows the server it has started from another one
            await self.app(scope, receive, self._marked(send))
        else:
            await self.app(scope, receive, send)

    def _marked(self, send: Any) -> Any:
        async def marked(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), self.mark]}
            await send(message)

        return marked

    def _has_key(self, scope: Scope) -> bool:
        if not self.key:
            return True
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            return hmac.compare_digest(given, self.key)
        return False


async def _refuse(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
