"""Small questions to a server on this machine, with the key that clients need."""

import json
import os
import urllib.error
import urllib.request
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.serving.plan import KEY

# Never through a proxy: the server is on this machine, or named by the user.
_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class NoAnswer(LlmkitError):
    """The server did not answer, or with an error."""


def ask(
    url: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    timeout: float = 60.0,
    expected: tuple[str, str] | None = None,
) -> Any:
    """The JSON that `url` + `path` answers: to a POST of `body`, or to a GET.

    Args:
        expected: a header of the answer and its value, by which the server is known.

    Raises:
        NoAnswer: if there is none, an error, or another server's.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data=data, headers=headers)
    try:
        with _OPEN(request, timeout=timeout) as answer:
            if expected and answer.headers.get(expected[0]) != expected[1]:
                raise NoAnswer(f"{url} is another server's address")
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        told = error.read(2000).decode(errors="replace")
        raise NoAnswer(f"{url}{path} answered {error.code}: {told}") from error
    except (OSError, ValueError) as error:
        raise NoAnswer(f"{url}{path} does not answer: {error}") from error
