"""What a chat template would make go wrong without any row showing it: the prompt at serving, values it ignores."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig
from llmkit.data.encoding.masks import STAND_IN, render
from llmkit.data.template_date import date_variables, writes_today
from llmkit.data.templates import split_defaults
from llmkit.errors import did_you_mean

SHOWN = 40  # characters of a prompt's end


def template_warnings(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[str]:
    """Each in a sentence; none for data that is all `text`, which the template never sees."""
    if not tokenizer.chat_template:
        return []
    return [*_other_prompt(tokenizer), *_unused_values(tokenizer, data), *_date_of_today(tokenizer, data)]


def _other_prompt(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whether an answer is learnt behind other text than the prompt that asks for it later."""
    question = {"role": "user", "content": "?"}
    try:
        prompt = render(tokenizer, [question], prompt=True)
        learnt = render(tokenizer, [question, {"role": "assistant", "content": STAND_IN}])
    except Exception:  # templates raise what they like; a row they refuse is named on its own
        return []
    if STAND_IN not in learnt or learnt.startswith(prompt):
        return []
    before = learnt.partition(STAND_IN)[0]
    return [
        f"the chat template asks for an answer with a prompt that ends in {prompt[-SHOWN:]!r}, but in training answers "
        f"come after {before[-SHOWN:]!r}: what is served is not what was learnt. Other data.chat_template_kwargs, or "
        "another data.chat_template, may make them the same."
    ]


def _unused_values(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[str]:
    words = {word for text in _texts(tokenizer) for word in re.findall(r"[A-Za-z_]\w*", split_defaults(text)[0])}
    return [
        f"data.chat_template_kwargs.{name} has no effect: the chat template has no such variable."
        f"{did_you_mean(name, words)}"
        for name in data.chat_template_kwargs
        if name not in words
    ]


def _date_of_today(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[str]:
    """Whether the rows are other tokens tomorrow: a date that the template lets be set has been set by now."""
    if not any(writes_today(text) and not _has_date(text, data) for text in _texts(tokenizer)):
        return []
    return [
        "the chat template writes today's date into every row and has no variable for it: tomorrow the same rows are "
        "other tokens, and a run does not go on from them. A copy of the template with a fixed date in the place of "
        "strftime_now(...), as data.chat_template=FILE, keeps them the same."
    ]


def _has_date(template: str, data: DataConfig) -> bool:
    return any(name in data.chat_template_kwargs for name in date_variables(split_defaults(template)[0]))


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Its chat templates: most tokenizers have one."""
    templates: Any = tokenizer.chat_template
    return list(templates.values()) if isinstance(templates, dict) else [templates]
