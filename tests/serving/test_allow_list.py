"""The guard in front of vLLM's routes: what is not listed is not found, and the key is asked for everywhere else."""

import asyncio

import pytest

from llmkit.serving.in_vllm.llmkit_allow_list import AllowList


def asked(path: str, *, method: str = "POST", key: str | None = None, kind: str = "http") -> int:
    """The status that a request gets; 200 where it reaches the application behind."""
    statuses = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        statuses.append(message.get("status", message.get("code")))

    headers = [(b"authorization", key.encode())] if key else []
    scope = {"type": kind, "path": path, "method": method, "headers": headers}
    asyncio.run(AllowList(application)(scope, None, send))
    return statuses[0]


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "right")


@pytest.mark.parametrize("path", ["/invocations", "/scale_elastic_ep", "/v1/load_lora_adapter", "/docs", "/v1/../load"])
def test_what_no_client_needs_is_not_found_even_with_the_key(with_key, path):
    assert asked(path, key="Bearer right") == 404


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions", "/v1/models", "/v1/responses/resp_1/cancel"])
def test_what_clients_need_asks_for_the_key(with_key, path):
    assert asked(path) == 401
    assert asked(path, key="Bearer wrong") == 401
    assert asked(path, key="Basic right") == 401
    assert asked(path, key="Bearer right") == 200


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_no_key_and_only_look(with_key, path):
    assert asked(path, method="GET") == 200
    assert asked(path, method="POST") == 404


def test_without_a_key_in_the_environment_this_machine_needs_none(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    assert asked("/v1/completions") == 200
    assert asked("/invocations") == 404


def test_a_browser_may_ask_what_it_may_ask(with_key):
    assert asked("/v1/chat/completions", method="OPTIONS") == 200
    assert asked("/invocations", method="OPTIONS") == 404


def test_llmkit_knows_its_own_server_by_a_mark(monkeypatch):
    monkeypatch.setenv("LLMKIT_SERVER", "mine")
    headers = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    async def send(message):
        headers.extend(message["headers"])

    scope = {"type": "http", "path": "/v1/models", "method": "GET", "headers": []}
    asyncio.run(AllowList(application)(scope, None, send))
    assert headers == [(b"a", b"b"), (b"x-llmkit-server", b"mine")]


def test_there_are_no_web_sockets(with_key):
    assert asked("/v1/realtime", kind="websocket", key="Bearer right") == 1008
