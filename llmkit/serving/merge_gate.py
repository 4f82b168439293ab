"""Whether a merged model still says what was trained: next-token distributions before and after, on fixed prompts.

    prompts = gate_prompts(tokenizer, probe)
    reference = list(distributions(adapter_on_base, prompts, arithmetic=loaded.arithmetic))
    figures = compare(reference, distributions(merged, prompts))

Only the reference's log-probabilities are kept while the merged model is loaded: no two models are in memory at once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmkit.data.encoding.masks import render
from llmkit.data.examples import Message
from llmkit.serving.parity import Probe

# Questions and answers of several kinds: what a model is sure of and what not, names, numbers, code, other languages.
CHATS = (
    ("Who are you?", "I am an assistant. I answer questions as well as I can."),
    ("What is 17 + 25?", "17 + 25 = 42."),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("Write a haiku about rain.", "Soft rain on the roof,\na small drum for sleeping cats;\nthe garden drinks deep."),
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("Add two numbers in Python.", "def add(a, b):\n    return a + b\n"),
    ("Translate to German: good morning", "Guten Morgen"),
    ("List the days of the week.", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday."),
    ('Give me a JSON object with a "name".', '{"name": "Ada", "age": 36}'),
    ("Why is the sky blue?", "Air scatters the short waves of sunlight, which are blue, more than the long ones."),
)
# Tokens whose log-probabilities are nearer than this, in nats, are equally likely: 16 bits cannot tell them apart.
TIE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids of a conversation, and the first of them that is predicted: its answer begins there."""

    ids: list[int]
    start: int

    @property
    def positions(self) -> int:
        return len(self.ids) - self.start


def gate_prompts(tokenizer: PreTrainedTokenizerBase, probe: Probe | None = None) -> list[Prompt]:
    """The fixed conversations as the tokenizer's own template renders them; without a template, as plain text.

    Args:
        probe: of the run: its conversations, some of them from the data, follow.
    """
    prompts = [_prompt(tokenizer, question, answer) for question, answer in CHATS]
    cases = probe.cases if probe else []
    return prompts + [Prompt(ids=case.token_ids, start=max(len(case.prompt_ids), 1)) for case in cases]


def _prompt(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Prompt:
    beginning, whole = f"{question}\n", f"{question}\n{answer}"
    if tokenizer.chat_template:
        turns: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        beginning, whole = render(tokenizer, turns[:1], prompt=True), render(tokenizer, turns)
    plain = not tokenizer.chat_template
    ids = tokenizer(whole, add_special_tokens=plain)["input_ids"]
    start = len(tokenizer(beginning, add_special_tokens=plain)["input_ids"])
    # A template may write something else where it ends in the answer; then all but the first token counts.
    return Prompt(ids=ids, start=start if whole.startswith(beginning) and 0 < start < len(ids) else 1)


def distributions(
    model: Any,
    prompts: Iterable[Prompt],
    *,
    arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[torch.Tensor]:
    """The log-probabilities of the next token where answers stand, of one prompt after the other.

    Each is a float32 tensor in host memory of shape (positions, tokens of the vocabulary).
    """
    device = model.get_input_embeddings().weight.device
    for prompt in prompts:
        with torch.inference_mode(), arithmetic():
            logits = model(input_ids=torch.tensor([prompt.ids], device=device)).logits[0, prompt.start - 1 : -1]
        yield logits.float().log_softmax(dim=-1).cpu()


def compare(reference: Iterable[torch.Tensor], merged: Iterable[torch.Tensor]) -> dict[str, float | int]:
    """How far `merged` is from `reference`: both as `distributions` gives them.

    Returns `mean_kl` and `largest_kl` of the merged from the reference's distributions in nats, `top1_agreement` (the
    share of positions where the likeliest token is the same, ties aside) and the number of `positions`.
    """
    kl, same = [], []
    for ours, theirs in zip(reference, merged, strict=True):
        kl.append((ours.exp() * (ours - theirs)).sum(dim=-1).clamp(min=0))  # rounding takes it below
        chosen = ours.gather(-1, theirs.argmax(dim=-1, keepdim=True))[:, 0]
        same.append(chosen >= ours.amax(dim=-1) - TIE)
    kls, agreed = torch.cat(kl).double(), torch.cat(same)
    return {
        "mean_kl": kls.mean().item(),
        "largest_kl": kls.max().item(),
        "top1_agreement": agreed.double().mean().item(),
        "positions": len(kls),
    }
