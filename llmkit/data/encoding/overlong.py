"""Conversations that are too long: shortened from the front, or split at turns. An answer is never cut."""

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

from llmkit.data.examples import Message

# A prompt shortened to fewer characters than this says nothing any more.
SHORTEST_PROMPT = 16


def leading_system_turns(messages: list[Message]) -> int:
    """How many messages at the start are the system's: they stay with every part of the conversation."""
    return next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)


def exchanges(messages: list[Message]) -> list[int]:
    """Where exchanges begin: a user's turn that does not follow another of the user's."""
    return [
        i for i, message in enumerate(messages)
        if message["role"] == "user" and (i == 0 or messages[i - 1]["role"] != "user")
    ]  # fmt: skip


def keep_from_front(messages: list[Message], last: int, fits: Callable[[list[Message]], bool]) -> int | None:
    """The first exchange to keep so that the rest fits, with the system's turns before it; None if none does.

    Args:
        last: the index of the last answer to learn; the exchange it belongs to has to stay.
        fits: whether a conversation is short enough.
    """
    system = messages[: leading_system_turns(messages)]
    starts = [start for start in exchanges(messages) if start < last]
    found = bisect_left(starts, True, key=lambda start: fits(system + messages[start:]))
    return starts[found] if found < len(starts) else None


def cut_prompt(messages: list[Message], turn: int, fits: Callable[[list[Message]], bool]) -> list[Message] | None:
    """`messages` with the beginning of the user's `turn` left out, as little as makes it fit; None if nothing does."""
    content = messages[turn].get("content") or ""

    def without(characters: int) -> list[Message]:
        shorter = messages[turn] | {"content": content[characters:]}
        return [*messages[:turn], shorter, *messages[turn + 1 :]]

    candidates = range(len(content) - SHORTEST_PROMPT + 1)
    found = bisect_left(candidates, True, key=lambda characters: fits(without(characters)))
    return without(found) if found < len(candidates) else None


def split_points(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[tuple[int, int]] | None:
    """(start, end) of parts that fit, each of whole exchanges, every exchange in one; None if one alone is too long."""
    system = messages[: leading_system_turns(messages)]
    starts = exchanges(messages)
    if not starts:
        return None
    starts[0] = len(system)  # a conversation may begin with an answer
    bounds = [*starts, len(messages)]

    def too_long(first: int, behind: int) -> bool:
        return not fits(system + messages[bounds[first] : bounds[behind]])

    parts, first = [], 0
    while first < len(starts):
        # The longest run of exchanges from `first` that fits.
        found = bisect_left(range(first + 1, len(bounds)), True, key=partial(too_long, first))
        if not found:
            return None
        parts.append((bounds[first], bounds[first + found]))
        first += found
    return parts
