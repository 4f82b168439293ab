"""`probe.json`: a few conversations as the trained model sees them, which whoever serves it must reproduce.

Of each conversation the tokens of the prompt (up to where the last answer begins), those of the whole, and the
log-probability in nats that the trained model gives each of them after the ones before.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llmkit.data.encoding.masks import render
from llmkit.data.examples import Conversation
from llmkit.serving.parity import Probe, Probed

PROBED_ROWS = 2  # conversations of the data, beside the fixed ones
LONGEST = 1024  # tokens of a conversation that is taken from the data
DIGITS = 5

FIXED = [
    [("user", "What is the capital of France?"), ("assistant", "Paris")],
    [
        ("user", "Name a colour."),
        ("assistant", "Blue."),
        ("user", "Another one, please:\n  - in upper case"),
        ("assistant", "GREEN"),
    ],
    [("system", "You answer with one word."), ("user", "Is water wet? äß 水"), ("assistant", "Yes")],
]


def make_probe(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Conversation],
    *,
    precision: str,
    arithmetic: AbstractContextManager[Any],
) -> Probe:
    """Ask the model as it stands, in evaluation mode.

    Args:
        rows: conversations of the data, of which those that are not too long are taken.
        precision: the run's, which the tolerance follows from.
        arithmetic: the context of a forward pass as in training; entered once.
    """
    fixed = [Conversation(messages=[{"role": r, "content": c} for r, c in turns], tools=None) for turns in FIXED]
    cases = [probed for one in fixed if (probed := _tokens(tokenizer, one))]
    cases += [probed for one in rows if (probed := _tokens(tokenizer, one)) and len(probed.token_ids) <= LONGEST]
    was_training = model.training
    model.eval()
    with torch.no_grad(), arithmetic:
        for case in cases:
            case.log_probs = _log_probs(model, case.token_ids)
    model.train(was_training)
    return Probe(precision=precision, cases=cases)


def _tokens(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Probed | None:
    """The conversation in tokens; None if the template does not take it (some know no system turn)."""
    messages, tools = conversation.messages, conversation.tools
    if tokenizer.chat_template is None or messages[-1]["role"] != "assistant":
        return None
    try:
        prompt = render(tokenizer, messages[:-1], tools=tools, prompt=True)
        whole = render(tokenizer, messages, tools=tools, prompt=False)
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
    return Probed(messages=messages, tools=tools, prompt_ids=ids[0], token_ids=ids[1], log_probs=[])


def _log_probs(model: Any, token_ids: list[int]) -> list[float]:
    """The log-probability in nats of every token but the first, shape (tokens - 1,)."""
    ids = torch.tensor([token_ids], device=next(model.parameters()).device)
    logits = model(input_ids=ids).logits[0, :-1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return [round(value, DIGITS) for value in chosen.tolist()]
