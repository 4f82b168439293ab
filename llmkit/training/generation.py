"""Greedy answers of the model in training: exact match over many rows, and a few samples to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmkit.data.encoding.masks import render
from llmkit.data.examples import Conversation, Message

BATCH_SIZE = 32
LONGEST_ANSWER = 256  # tokens, where the user sets no limit


@dataclass(frozen=True)
class Answer:
    """A generated answer beside the one in the data."""

    prompt: str
    answer: str
    expected: str

    @property
    def matches(self) -> bool:
        return _spoken(self.answer) == _spoken(self.expected)


def _spoken(answer: str) -> str:
    """An answer without the thinking in front of it, which templates may add or leave out, and outer white space."""
    return answer.rpartition("</think>")[2].strip()


class AnswerGenerator:
    """Answers prompts with the weights as they are now. One instance serves a whole run.

    With several processes each answers all prompts.

    Args:
        synced: whether a forward pass takes all of them, because each holds only a part of the weights.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int | None,
        autocast: torch.dtype | None,
        synced: bool = False,
    ):
        self.model, self.tokenizer, self.max_new_tokens, self.autocast = model, tokenizer, max_new_tokens, autocast
        self.synced = synced

    def answer(self, conversations: list[Conversation]) -> list[Answer]:
        """Generate the last turn of each conversation, an assistant's, from the turns before it."""
        cases = [(self._prompt(conversation), conversation.messages) for conversation in conversations]
        limit = self.max_new_tokens or self._longest_reference([turns for _, turns in cases])
        # Equal lengths together: less padding. The answers go back into the order of the conversations.
        order = sorted(range(len(cases)), key=lambda index: len(cases[index][0]))
        texts: dict[int, str] = {}
        with _generating(self.model):
            for start in range(0, len(order), BATCH_SIZE):
                batch = order[start : start + BATCH_SIZE]
                for index, text in zip(batch, self._generate([cases[i][0] for i in batch], limit), strict=True):
                    texts[index] = text
        return [
            Answer(
                prompt=(turns[-2].get("content") if len(turns) > 1 else None) or prompt,  # a tool call says nothing
                answer=texts[i],
                expected=turns[-1]["content"],
            )
            for i, (prompt, turns) in enumerate(cases)
        ]

    def arithmetic(self) -> torch.autocast:
        """The context of a forward pass as in training: trained weights in float32 meet frozen ones in 16 bits."""
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def _prompt(self, conversation: Conversation) -> str:
        return render(self.tokenizer, conversation.messages[:-1], tools=conversation.tools, prompt=True)

    def _longest_reference(self, conversations: list[list[Message]]) -> int:
        answers = self.tokenizer([turns[-1]["content"] for turns in conversations], add_special_tokens=False)
        # One more for the end of the turn, a little more so that an answer that is too long is seen to be.
        return min(max(len(ids) for ids in answers["input_ids"]) + 8, LONGEST_ANSWER)

    def _generate(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        device = next(self.model.parameters()).device
        batch = self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(device)
        own = self.model.generation_config
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=own.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=own.bos_token_id,
        )
        with self.arithmetic():
            output = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=config,
                synced_gpus=self.synced,
            )
        return self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(answers: list[Answer]) -> float:
    """The share of answers equal to the expected one, thinking and outer white space aside."""
    return sum(answer.matches for answer in answers) / len(answers)


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Evaluation mode with the key-value cache on, whatever training had set; and the random state untouched."""
    was_training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.config.use_cache = use_cache
        model.train(was_training)
