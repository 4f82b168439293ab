"""Answers from an OpenAI-compatible endpoint: vLLM as `llmkit serve` starts it, or another.

    with Endpoint.at("http://127.0.0.1:8000", wanted="alpha") as endpoint:
        endpoint.reply(messages, Sampling(), write=print)

The key, where one is needed, is read from the environment. Free of torch.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from llmkit.data.examples import Conversation, Message
from llmkit.errors import ConfigError, did_you_mean
from llmkit.serving.answers import LONGEST_REPLY, AnswerError, Sampling
from llmkit.serving.plan import LOCAL_HOSTS
from llmkit.serving.state import running
from llmkit.serving.target import Target

if TYPE_CHECKING:
    from llmkit.training.generation import Answer

KEYS = ("VLLM_API_KEY", "OPENAI_API_KEY")  # variables of the environment
RETRIES = 5  # of a request that was refused or cut off, half a second to eight seconds apart
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 600.0
CONCURRENCY = 16


class Endpoint:
    """A model at an endpoint; a context manager, which closes the connections.

    Args:
        url: with the version: http://127.0.0.1:8000/v1.
        model: its name in requests.
        is_vllm: whether it takes what the OpenAI interface does not know.
    """

    def __init__(self, url: str, model: str, *, is_vllm: bool, concurrency: int = CONCURRENCY):
        self.url, self.model, self.is_vllm, self.concurrency = url, model, is_vllm, concurrency
        self.where = f"{url} ({model})"
        self._client = _client(url)

    @classmethod
    def at(
        cls, url: str, *, name: str | None = None, wanted: str | None = None, concurrency: int = CONCURRENCY
    ) -> Self:
        """The model that is served there.

        Args:
            name: its name in requests.
            wanted: the name it is expected to have, taken where it is served and `name` is not given.

        Raises:
            ConfigError: if the address is none, or `name` has to be another, or has to be given.
            AnswerError: if nothing answers, or not to us.
        """
        url = endpoint_url(url)
        with _client(url, max_retries=1) as client, _explained(url):
            cards = list(client.models.list())
        served = [card.id for card in cards]
        is_vllm = any(card.owned_by == "vllm" for card in cards)
        return cls(url, _chosen(url, cards, served, name, wanted), is_vllm=is_vllm, concurrency=concurrency)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def reply(self, messages: list[Message], sampling: Sampling, write: Callable[[str], None]) -> None:
        """See Answering."""
        stopped_at = sampling.max_new_tokens or LONGEST_REPLY
        settings: dict[str, Any] = {"temperature": sampling.temperature}
        if sampling.max_new_tokens is not None:
            settings["max_tokens"] = sampling.max_new_tokens
        with (
            _explained(self.url),
            self._client.chat.completions.create(
                model=self.model, messages=_as_sent(messages), stream=True, **settings
            ) as stream,
        ):
            for number, chunk in enumerate(stream):
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    write(text)
                if (
                    number > stopped_at
                ):  # leaving ends the generation; a limit that the context does not hold is refused
                    break

    def answer(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, told: Callable[[int], None]
    ) -> "list[Answer]":
        """See Answering. `concurrency` requests are under way at a time; the first that fails for good ends it."""
        return asyncio.run(self._answer_all(conversations, max_new_tokens, told))

    async def _answer_all(
        self, conversations: Sequence[Conversation], max_new_tokens: int, told: Callable[[int], None]
    ) -> "list[Answer]":
        from llmkit.training.generation import Answer

        gate = asyncio.Semaphore(self.concurrency)
        settings: dict[str, Any] = {"model": self.model, "temperature": 0.0, "max_tokens": max_new_tokens}
        if self.is_vllm:  # which takes a penalty from generation_config.json, as greedy answers in process do not
            settings["extra_body"] = {"repetition_penalty": 1.0}

        async def one(client: Any, number: int, conversation: Conversation) -> Answer:
            *before, expected = conversation.messages
            tools: dict[str, Any] = {"tools": conversation.tools, "tool_choice": "none"} if conversation.tools else {}
            async with gate:
                with _explained(self.url, of=f"example {number + 1}"):
                    done = await client.chat.completions.create(messages=_as_sent(before), **settings, **tools)
            told(1)
            asked = before[-1].get("content") if before else None
            return Answer(
                prompt=asked or json.dumps(before, ensure_ascii=False),
                answer=done.choices[0].message.content or "",
                expected=expected["content"],
            )

        async with _async_client(self.url) as client:
            return await asyncio.gather(*(one(client, *numbered) for numbered in enumerate(conversations)))


def endpoint_url(url: str) -> str:
    """The address that requests begin with, for one as a user writes it. Raises ConfigError if it is no address."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise ConfigError(f"url={url}: an address is http://HOST:PORT, or https://.../v1.")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def running_server(target: Target, *, name: str | None = None) -> tuple[str, str] | None:
    """The address of the server that `llmkit serve` has running for this target, and what the target is called there.

    Args:
        name: what it is called, where that is known.
    """
    server = running(target.home)
    if server is None or not server.ready:
        return None
    meant = [called for called, source in server.sources.items() if source == target.source or called == name]
    return (server.url, name or meant[0]) if meant and name in (None, *meant) else None


def _chosen(url: str, cards: list[Any], served: list[str], name: str | None, wanted: str | None) -> str:
    if name is not None:
        if name not in served:
            raise ConfigError(f"name={name}: {url} serves {', '.join(served)}.{did_you_mean(name, served)}")
        return name
    if wanted in served:
        return wanted
    # vLLM lists a base beside its adapters, which name it as their parent.
    adapters = [card.id for card in cards if getattr(card, "parent", None)]
    for names in (served, adapters):
        if len(names) == 1:
            return names[0]
    if not served:
        raise AnswerError(f"{url} serves no model.")
    raise ConfigError(f"{url} serves several models; say which: name={served[0]} (there are {', '.join(served)}).")


def _client(url: str, **settings: Any) -> Any:
    from openai import DefaultHttpxClient, OpenAI

    return OpenAI(http_client=DefaultHttpxClient(trust_env=not _is_here(url)), **_client_arguments(url) | settings)


def _async_client(url: str) -> Any:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    return AsyncOpenAI(http_client=DefaultAsyncHttpxClient(trust_env=not _is_here(url)), **_client_arguments(url))


def _client_arguments(url: str) -> dict[str, Any]:
    from openai import Timeout

    key = next((value for name in KEYS if (value := os.environ.get(name))), "none")
    timeout = Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    return {"base_url": url, "api_key": key, "timeout": timeout, "max_retries": RETRIES}


def _is_here(url: str) -> bool:
    """Whether the server is on this machine, which no proxy in the environment leads to."""
    return urlsplit(url).hostname in LOCAL_HOSTS


@contextmanager
def _explained(url: str, *, of: str | None = None) -> Iterator[None]:
    """Turn the client's errors into a message; `of` says which request it was."""
    import openai

    said = f"{url}, {of}" if of else url
    try:
        yield
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        given = next((name for name in KEYS if os.environ.get(name)), None)
        hint = f"the one in {given} is not it" if given else f"set {KEYS[0]} in the environment"
        raise AnswerError(f"{said}: the server asks for a key; {hint}.") from error
    except openai.NotFoundError as error:
        raise AnswerError(f"{said}: no OpenAI-compatible endpoint, or another model: {_first_line(error)}") from error
    except openai.APITimeoutError as error:
        raise AnswerError(f"{said}: no answer in time.") from error
    except openai.APIConnectionError as error:
        raise AnswerError(f"{said}: nothing answers there ({_first_line(error.__cause__ or error)}).") from error
    except openai.APIError as error:
        raise AnswerError(f"{said}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return (str(message or error).strip() or type(error).__name__).splitlines()[0]


def _as_sent(messages: list[Message]) -> Any:
    """Messages as the interface takes them: the arguments of tool calls are text there."""
    return [
        message | {"tool_calls": list(map(_call_as_sent, calls))} if (calls := message.get("tool_calls")) else message
        for message in messages
    ]


def _call_as_sent(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    sent = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": sent}}
