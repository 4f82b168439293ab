"""Runs of LoRA that train together: their rows go through the frozen base at once, all else is each one's own.

Every run keeps the recipe, trainer, optimizer, metrics and checkpoints that it would have alone. Where its trainer
would apply the decoder to a batch, it waits until the others are there too; they go through it together (`JointTrunk`),
and each goes on with its own part: head, loss, gradient of that. The gradients go back together likewise.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmkit.config import TrainConfig
from llmkit.training.longest_batch import row_lengths
from llmkit.training.pack.process_state import Output, ProcessState
from llmkit.training.pack.shared_base import sharing_weights
from llmkit.training.pack.trunk import JointStep, JointTrunk, can_join, own_dropout, replaced_layers
from llmkit.training.pack.turns import Turn

# Tokens in a step from which on a matrix product does not get faster by having more of them: on a CPU about 128 (seen
# with AVX-512), on a large GPU some 4,000. Beyond, joint steps only take memory.
ENOUGH_TOKENS = {"cpu": 128, "cuda": 4096}

_member: ContextVar["Member | None"] = ContextVar("member", default=None)

ALONE = object()  # the answer to a member that is to apply its decoder itself


class Member:
    """One run of a pack."""

    def __init__(self, pack: "Pack", config: TrainConfig, run_dir: Path, log: TextIO):
        self.pack, self.config, self.run_dir = pack, config, run_dir
        self.layers: dict[str, nn.Module] = {}
        self.micro_batches = 0
        self.state = ProcessState(pack.output, log)
        self.turn: Turn | None = None
        self._part: torch.Tensor | None = None  # of a joint step, until its gradient is there

    def start(self, work: Callable[[], None]) -> None:
        """Begin its work, in a thread of its own, which waits for its turn."""

        def in_its_context() -> None:
            _member.set(self)
            work()

        self.turn = Turn(in_its_context, self.state)

    def join(self, trainer: Any) -> None:
        """Called by the run itself, when all is ready for the first step: from now on its steps are joint ones."""
        model: PreTrainedModel = trainer.model.get_base_model()
        trunk: nn.Module = model.base_model
        self.layers = replaced_layers(trunk)
        self.pack.learn(trainer)
        forward, backward = trunk.forward, trainer.accelerator.backward

        def joint_forward(*args: Any, **kwargs: Any) -> Any:
            if args or self.pack.width == 1 or not (trunk.training and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            assert self.turn is not None
            answer = self.turn.wait(kwargs)
            if answer is ALONE:
                return forward(**kwargs)
            self._part = answer
            return BaseModelOutputWithPast(last_hidden_state=answer)

        def joint_backward(loss: torch.Tensor, **kwargs: Any) -> None:
            backward(loss, **kwargs)
            if self._part is not None:
                assert self.turn is not None
                self._part = None
                self.turn.wait({})

        trunk.forward = joint_forward
        trainer.accelerator.backward = joint_backward


class Pack:
    """Several runs that differ in nothing but their adapters, optimisation and order of data.

    Args:
        work: what a run does, from its first line to its last; it raises nothing.
        width: how many train at a time; None: as many as make a step large enough for the device, and fit.
        output: the streams of the process, which each run's output is taken from.
    """

    def __init__(
        self,
        runs: Sequence[tuple[TrainConfig, Path]],
        work: Callable[[TrainConfig, Path], None],
        *,
        width: int | None,
        output: Output,
        log: Callable[[Path], TextIO],
    ):
        self.output, self._work = output, work
        self.width = width or 1
        self._width_asked = width
        self._waiting = deque(Member(self, config, run_dir, log(run_dir)) for config, run_dir in runs)
        self._training: list[Member] = []
        self._count = len(runs)
        self._base: tuple[PreTrainedModel, list[int]] | None = None
        self._trunk: JointTrunk | None = None
        self._micro_batches = self._apart = 0

    def base(self, load: Callable[[], tuple[PreTrainedModel, list[int]]]) -> tuple[PreTrainedModel, list[int]]:
        """The base that all share, loaded by the first who asks: each gets modules of its own around its weights."""
        if self._base is None:
            self._base = load()
        model, new_rows = self._base
        return sharing_weights(model), new_rows

    def learn(self, trainer: Any) -> None:
        """What the first run to train finds out for all."""
        if self._trunk is not None:
            return
        assert self._base is not None
        args = trainer.args
        self._trunk = JointTrunk(
            sharing_weights(self._base[0]),
            autocast=trainer.accelerator.autocast,
            checkpointing=args.gradient_checkpointing,
        )
        tokens = int(row_lengths(trainer.train_dataset).mean() * args.per_device_train_batch_size)
        enough = ENOUGH_TOKENS[args.device.type]
        fitting = max(enough // max(tokens, 1), 1)
        self.width = min(self._width_asked or fitting, self._count)
        how = f"a micro-batch has {tokens} tokens, and about {enough} keep this device busy"
        if self._width_asked:
            how = f"launcher.width={self._width_asked}"
        if drawing := own_dropout(trainer.model.get_base_model().base_model):
            self.width, how = 1, f"the model's own dropout ({drawing}) would draw other numbers for joint batches"
        together = "one after the other" if self.width == 1 else f"{self.width} at a time"
        print(f"{'pack':<10} {self._count} runs on one base, {together}: {how}", file=self.output.own, flush=True)

    def run(self) -> None:
        """Run all to their ends."""
        while self._waiting or self._training:
            while self._waiting and len(self._training) < self.width:
                self._start(self._waiting.popleft())
            if self._training:
                self._step()
        how = "all of them together" if not self._apart else f"{self._apart} of them by themselves"
        if self._micro_batches:
            print(f"{'pack':<10} {self._micro_batches} micro-batches, {how}", file=self.output.own, flush=True)

    def _start(self, member: Member) -> None:
        member.start(lambda: self._work(member.config, member.run_dir))
        # Beside the others from its first step on, however many they have done.
        member.micro_batches = min((other.micro_batches for other in self._training), default=0)
        self._training.append(member)
        self._go(member)

    def _go(self, member: Member, answer: Any = None) -> None:
        assert member.turn is not None
        member.turn.go(answer)
        if member.turn.ended:
            self._training.remove(member)

    def _step(self) -> None:
        """A micro-batch of those that are furthest behind: all of them, unless one has just joined."""
        fewest = min(member.micro_batches for member in self._training)
        members = [member for member in self._training if member.micro_batches == fewest]
        for member in members:
            member.micro_batches += 1
        batches = [member.turn.asks for member in members if member.turn is not None]
        self._micro_batches += len(members)
        if len(members) == 1 or not can_join(batches):
            self._apart += len(members)
            for member in members:
                self._go(member, ALONE)
            return
        assert self._trunk is not None
        step: JointStep = self._trunk.forward(members, batches)
        for member, part in zip(members, step.hidden, strict=True):
            self._go(member, part)
        step.backward()
        for member in members:
            if member in self._training and member.turn is not None and not member.turn.asks:
                self._go(member)


def shared_or_own(load: Callable[[], tuple[PreTrainedModel, list[int]]]) -> tuple[PreTrainedModel, list[int]]:
    """The base of the run that asks: that of its pack, or, for a run of its own, a newly loaded one."""
    member = _member.get()
    return load() if member is None else member.pack.base(load)


def join_pack(trainer: Any) -> None:
    """Have the steps of the run that asks be joint ones from now on, if it is one of a pack."""
    if member := _member.get():
        member.join(trainer)
