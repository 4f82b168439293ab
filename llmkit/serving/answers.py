"""One small interface to whatever answers: a model in this process (in_process.py) or an endpoint (endpoint.py).

    answering.reply(messages, Sampling(), write=print)
    answers = answering.answer(conversations, max_new_tokens=64, told=progress)

Free of torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmkit.data.examples import Conversation, Message
from llmkit.errors import LlmkitError

if TYPE_CHECKING:
    from llmkit.training.generation import Answer

LONGEST_REPLY = 1024  # tokens, where the user sets no limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a reply is generated."""

    max_new_tokens: int | None = None  # unset: LONGEST_REPLY, or what the context has room for
    temperature: float = 0.0  # 0: the likeliest token each time


class AnswerError(LlmkitError):
    """A model or an endpoint that gives no answer: says why, and what may help."""


class Answering(Protocol):
    """A model that answers."""

    where: str  # in words: the url, or this process and its device

    def reply(self, messages: list[Message], sampling: Sampling, write: Callable[[str], None]) -> None:
        """Generate the next turn of a conversation, and write it piece by piece, whole characters only.

        Raises AnswerError.
        """

    def answer(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, told: Callable[[int], None]
    ) -> "list[Answer]":
        """Generate the last turn of each conversation, an assistant's, greedily from the turns before it.

        Args:
            told: called with how many more are done.

        Raises:
            AnswerError: names the conversation.
        """
