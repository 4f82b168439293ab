"""What a chat template would make go wrong without any row showing it: the prompt at serving, values it ignores."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import DataConfig
from llmkit.data.encoding.masks import STAND_IN, render
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
    templates: Any = tokenizer.chat_template
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    words = {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", split_defaults(text)[0])}
    return [
        f"data.chat_template_kwargs.{name} has no effect: the chat template has no such variable."
        f"{did_you_mean(name, words)}"
        for name in data.chat_template_kwargs
        if name not in words
    ]


def _date_of_today(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[str]:
    """Llama 3's templates write the date of the day the rows are prepared, unless they are given one."""
    if "strftime_now" not in str(tokenizer.chat_template) or "date_string" in data.chat_template_kwargs:
        return []
    return [
        "the chat template writes today's date into every row: tomorrow the same rows are other tokens, and a run does "
        "not go on from them. data.chat_template_kwargs={date_string: DATE} fixes it, where the template has that."
    ]
