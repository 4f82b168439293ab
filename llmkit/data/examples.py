"""The one internal form of a training example, whatever its row looked like."""

from dataclasses import dataclass
from typing import Any

# As chat templates take it: `role` and `content` (text), and where there are any `reasoning_content`, `tool_calls`
# (OpenAI's form, `arguments` as a mapping), `tool_call_id`, `name`.
Message = dict[str, Any]
Tools = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation to learn the assistant's turns of; or `text`, to learn whole, without a chat template."""

    messages: list[Message]
    tools: Tools | None = None
    learnt: list[bool] | None = None  # per message, by the row's own word (loss_weight, train); None: all
    prompt_turns: int | None = None  # leading messages that the row itself calls the prompt
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two ways to go on after `prompt`; the chosen one is to become the likelier."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: Tools | None = None


Example = Conversation | Preference
