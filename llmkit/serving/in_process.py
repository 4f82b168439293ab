"""Answers from a model in this process, through Transformers."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig

from llmkit.config import TrainConfig
from llmkit.data.encoding.masks import render
from llmkit.data.examples import Conversation, Message
from llmkit.errors import ConfigError
from llmkit.model.structure import token_matrices
from llmkit.model.tokenizer import load_run_tokenizer, set_pad_token
from llmkit.serving.answers import LONGEST_REPLY, AnswerError, Sampling
from llmkit.serving.loaded import Loaded, load_target, load_target_tokenizer
from llmkit.serving.streaming import PieceStreamer
from llmkit.serving.target import Target
from llmkit.training.advice import is_out_of_memory
from llmkit.training.generation import BATCH_SIZE, Answer, AnswerGenerator

SAMPLED_WITH = ("top_k", "top_p", "min_p", "repetition_penalty")  # settings of a model's generation_config.json


class InProcess:
    """A loaded model that answers.

    Args:
        without_adapter: answer with the base that the adapter is on.
    """

    def __init__(self, loaded: Loaded, *, without_adapter: bool = False):
        self.loaded, self.without_adapter = loaded, without_adapter
        self.where = f"in this process, on {loaded.device.type}"

    def reply(self, messages: list[Message], sampling: Sampling, write: Callable[[str], None]) -> None:
        """See Answering."""
        tokenizer, device = self.loaded.tokenizer, self.loaded.device
        try:
            prompt = render(tokenizer, messages, prompt=True)
        except TemplateError as error:
            raise AnswerError(f"the model's chat template does not take this conversation: {error}") from error
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(device)
        room = self._room(inputs["input_ids"].shape[1])
        longest = min(room, sampling.max_new_tokens or LONGEST_REPLY)
        with self.loaded.arithmetic(), self._adapter():
            self.loaded.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=self._generation(sampling, longest),
                streamer=PieceStreamer(tokenizer, write),
            )

    def answer(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, told: Callable[[int], None]
    ) -> list[Answer]:
        """See Answering. Batches are of like lengths, and become smaller where the memory does not hold them."""
        generator = AnswerGenerator(
            self.loaded.model, self.loaded.tokenizer, max_new_tokens=max_new_tokens, autocast=self.loaded.autocast
        )
        order = sorted(range(len(conversations)), key=lambda index: _length(conversations[index]), reverse=True)
        answers: dict[int, Answer] = {}
        size = BATCH_SIZE
        with self._adapter():
            while left := order[len(answers) :]:
                batch = left[:size]
                try:
                    found = generator.answer([conversations[index] for index in batch])
                except (RuntimeError, MemoryError) as error:
                    if size == 1 or not is_out_of_memory(error):
                        raise
                    size //= 2
                    continue
                answers |= dict(zip(batch, found, strict=True))
                told(len(batch))
        return [answers[index] for index in range(len(conversations))]

    def _adapter(self) -> AbstractContextManager[Any]:
        return self.loaded.model.disable_adapter() if self.without_adapter else nullcontext()

    def _room(self, prompt: int) -> int:
        """How many tokens the context has left. Raises AnswerError where a prompt of so many leaves none."""
        context = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and prompt >= context:
            raise AnswerError(
                f"the conversation has {prompt:,} tokens and the model takes {context:,}; begin anew, or ask less."
            )
        return LONGEST_REPLY**2 if context is None else context - prompt

    def _generation(self, sampling: Sampling, longest: int) -> GenerationConfig:
        own = self.loaded.model.generation_config
        settings: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            values = {name: getattr(own, name, None) for name in SAMPLED_WITH}
            settings = {"do_sample": True, "temperature": sampling.temperature}
            settings |= {name: value for name, value in values.items() if value is not None}
        return GenerationConfig(
            max_new_tokens=longest,
            eos_token_id=own.eos_token_id,
            bos_token_id=own.bos_token_id,
            pad_token_id=self.loaded.tokenizer.pad_token_id,
            use_cache=True,
            **settings,
        )


def load_answering(target: Target, config: TrainConfig) -> InProcess:
    """The target, ready to answer with its chat template.

    Args:
        config: of the command; where no run says how a model renders, its model and data settings do.

    Raises:
        ConfigError: if it cannot be had, or has no chat template.
    """
    loaded = load_target(target)
    return InProcess(
        dataclasses.replace(loaded, tokenizer=_fitted(loaded.model, load_answering_tokenizer(target, config)))
    )


def load_answering_tokenizer(target: Target, config: TrainConfig) -> Any:
    """The target's tokenizer, with a chat template and a padding token."""
    if target.run is None and target.is_whole:
        config.model = target.base
        return load_run_tokenizer(config)
    tokenizer = load_target_tokenizer(target)
    if not tokenizer.chat_template:
        raise ConfigError(f"{target.said}: its tokenizer has no chat template, so how it is asked is not known.")
    if tokenizer.pad_token is None:
        set_pad_token(tokenizer, "auto")
    return tokenizer


def load_base(target: Target, tuned: InProcess) -> InProcess:
    """What `tuned` was before training, asked in the same words: the adapter switched off, or the whole base.

    Raises ConfigError if nothing was trained of it.
    """
    if target.adapter is not None:
        return InProcess(tuned.loaded, without_adapter=True)
    if target.run is None:
        raise ConfigError(f"compare=true: {target.said} is no run, so there is no base to compare it with.")
    # Its tokenizer and template stay those of the run, which lie in `source`.
    base = dataclasses.replace(target, base=target.run.model, is_partial=False)
    loaded = load_target(base)
    _fitted(loaded.model, tuned.loaded.tokenizer)
    loaded.model.generation_config = tuned.loaded.model.generation_config
    return InProcess(dataclasses.replace(loaded, tokenizer=tuned.loaded.tokenizer))


def _fitted(model: Any, tokenizer: Any) -> Any:
    """The tokenizer, for all of whose tokens the model has rows now."""
    if len(tokenizer) > len(token_matrices(model)[0]):
        model.resize_token_embeddings(len(tokenizer))
    return tokenizer


def _length(conversation: Conversation) -> int:
    return sum(len(message.get("content") or "") for message in conversation.messages[:-1])
