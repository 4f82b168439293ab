"""Runs of LoRA that train together: their rows go through the frozen base at once, all else is each one's own.

Every run keeps the recipe, trainer, optimizer, metrics and checkpoints that it would have alone. Where its trainer
would apply the decoder to a batch, it waits until the others are there too; they go through it together (`JointTrunk`),
and each goes on with its own part: head, loss, gradient of that. The gradients go back together likewise.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.config.launcher_schema import PackedLauncherConfig
from llmkit.errors import OutOfMemory
from llmkit.training.advice import is_out_of_memory, reason
from llmkit.training.memory import optimizer_state, peak_memory
from llmkit.training.pack.output import Output
from llmkit.training.pack.process_state import ProcessState
from llmkit.training.pack.shared_base import sharing_weights
from llmkit.training.pack.trunk import JointStep, JointTrunk, NotOfRows, can_join, replaced_layers
from llmkit.training.pack.turns import Turn
from llmkit.training.pack.verification import Verification
from llmkit.training.pack.width import Room, at_a_time, choose_width
from llmkit.training.rungs import Compare, Verdict, judge, recorded
from llmkit.training.stopping import StopRequest

_member: ContextVar["Member | None"] = ContextVar("member", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtRung:
    """What a member asks for that waits to be compared with the others."""

    step: int


ALONE = object()  # the answer to a member that is to apply its decoder itself


class Member:
    """One run of a pack."""

    def __init__(self, pack: "Pack", config: TrainConfig, run_dir: Path, *, stop: StopRequest, log: TextIO):
        self.pack, self.config, self.run_dir = pack, config, run_dir
        self.stop = StopRequest(stop, mark=run_dir / rundir.CANCEL)
        self.layers: dict[str, nn.Module] = {}
        self.micro_batches = self.joint_passes = 0
        self.device_seconds = 0.0  # its part of the time that the pack has trained
        self.state, self._log = ProcessState(), log
        self.turn: Turn | None = None
        self._part: torch.Tensor | None = None  # of a joint step, until its gradient is there
        self._apart = False  # whether its passes are its own now

    @property
    def asks(self) -> Any:
        """What it waits for."""
        assert self.turn is not None
        return self.turn.asks

    @property
    def at_rung(self) -> bool:
        """Whether it waits to be compared with the others."""
        return self.turn is not None and isinstance(self.turn.asks, AtRung)

    def compare(self, step: int) -> Verdict | None:
        """Called by the run itself at a rung: wait until the others are there, and hear where it stands.

        None if it is to stop before they are.
        """
        assert self.turn is not None
        self.pack.device_seconds(self)  # up to here: it does not work while it waits
        return self.turn.wait(AtRung(step=step))

    def start(self, work: Callable[[], None]) -> None:
        """Begin its work, on a stack of its own, which waits for its turn."""

        def in_its_context() -> None:
            _member.set(self)
            self.pack.output.goes_to(self._log)
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
            apart = self._apart or self.pack.width == 1
            if args or apart or not (trunk.training and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            assert self.turn is not None
            answer = self.turn.wait(kwargs)
            if answer is ALONE:
                return forward(**kwargs)
            self._part = answer
            self.joint_passes += 1
            return BaseModelOutputWithPast(last_hidden_state=answer)

        def joint_backward(loss: torch.Tensor, **kwargs: Any) -> None:
            backward(loss, **kwargs)
            if self._part is not None:
                assert self.turn is not None
                self._part = None
                self.turn.wait({})

        trunk.forward = joint_forward
        trainer.accelerator.backward = joint_backward
        assert isinstance(self.config.launcher, PackedLauncherConfig)
        if self.pack.width > 1 and (steps := self.config.launcher.verify):
            told = f"{self.run_dir.name}, the first {steps} step{'s' if steps > 1 else ''}:"
            count = steps * trainer.args.gradient_accumulation_steps
            Verification(
                trainer,
                count,
                alone=self.alone,
                joint_passes=lambda: self.joint_passes,
                tell=lambda found: self.pack.say(f"{told} {found}"),
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Its passes within are its own."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False


class Pack:
    """Several runs that differ in nothing but their adapters, optimisation and order of data.

    Args:
        work: what a run does, from its first line to its last; it raises nothing, and ends at once if asked to stop.
        width: how many train at a time; None: as many as make a step large enough for the device, and fit.
        stop: a request to all of them.
        output: the streams of the process, which each run's output is taken from.
    """

    def __init__(
        self,
        runs: Sequence[tuple[TrainConfig, Path]],
        work: Callable[[TrainConfig, Path, StopRequest], None],
        *,
        width: int | None,
        stop: StopRequest,
        output: Output,
        log: Callable[[Path], TextIO],
    ):
        self.output, self._work = output, work
        self.width = width or 1
        self._asked = width
        self._waiting = deque(Member(self, config, run_dir, stop=stop, log=log(run_dir)) for config, run_dir in runs)
        self._training: list[Member] = []
        self._count = len(runs)
        self._verifies = any(isinstance(c.launcher, PackedLauncherConfig) and c.launcher.verify for c, _ in runs)
        self._base: tuple[PreTrainedModel, list[int]] | None = None
        self._trunk: JointTrunk | None = None
        self._micro_batches = self._apart = 0
        self._told = time.monotonic()  # until when its runs have been told what part of the device they had
        self.room: Room | None = None  # as the first run has found it
        self._most = self._count  # runs that are begun and not ended, at rungs too
        self.peak = 0  # bytes in use at most, before the last trial began to measure anew

    def base(self, load: Callable[[], tuple[PreTrainedModel, list[int]]]) -> tuple[PreTrainedModel, list[int]]:
        """The base that all share, loaded by the first who asks: each gets modules of its own around its weights."""
        if self._base is None:
            self._base = load()
        model, new_rows = self._base
        return sharing_weights(model), new_rows

    @property
    def has_begun(self) -> bool:
        """Whether a run has come to its first step."""
        return self._trunk is not None

    def learn(self, trainer: Any) -> None:
        """What the first run to train finds out for all."""
        if self._trunk is not None:
            return
        assert self._base is not None
        args = trainer.args
        self._trunk = JointTrunk(
            sharing_weights(self._base[0]),
            autocast=_autocast(args),
            checkpointing=args.gradient_checkpointing,
        )
        why_apart = self._trunk.why_apart()
        width = choose_width(trainer, why_apart=why_apart, asked=self._asked, count=self._count, room=self.room)
        self.width = width.runs
        vain = "; launcher.verify has nothing to compare" if width.runs == 1 and self._verifies else ""
        self.say(f"{self._count} runs on one base, {width.in_words()}{vain}")
        if self.room is not None:
            self._most = self.room.begun(self.width)
        if self._most < self._count and self._waiting and self._waiting[0].config.early_stop.name != "none":
            self.say(f"room for {self._most} that wait at a rung: each is compared with those that came before it")

    def device_seconds(self, member: Member) -> float:
        """The part of the time so far that a run has had the device, which runs that train together share equally."""
        self._count_time()
        return member.device_seconds

    def _count_time(self) -> None:
        now = time.monotonic()
        at_work = [member for member in self._training if not member.at_rung]
        for member in at_work:
            member.device_seconds += (now - self._told) / len(at_work)
        self._told = now

    def say(self, text: str) -> None:
        """Tell what all the runs are about."""
        print(f"{'pack':<10} {text}", file=self.output.own, flush=True)

    def run(self) -> None:
        """Run all to their ends, or until a stop is asked for."""
        while self._training or self._waiting:
            self._let_stop()
            at_work = [member for member in self._training if not member.at_rung]
            may_begin = len(at_work) < self.width and len(self._training) < max(self._most, self.width)
            if self._waiting and may_begin:
                self._start(self._waiting.popleft())
            elif at_work:
                self._step(at_work)
            elif self._training:
                self._compare()
        self._base = self._trunk = None
        how = "all of them together" if not self._apart else f"{self._apart} of them by themselves"
        if self._micro_batches:
            self.say(f"{self._micro_batches} micro-batches, {how}")

    def _let_stop(self) -> None:
        """Have those end that are to stop and wait, for their beginning or at a rung; the others hear it themselves."""
        for member in [member for member in self._waiting if member.stop.signal]:
            self._waiting.remove(member)
            self._start(member)
        for member in [member for member in self._training if member.at_rung and member.stop.signal]:
            self._go(member)

    def _start(self, member: Member) -> None:
        member.start(lambda: self._work(member.config, member.run_dir, member.stop))
        self._count_time()
        # Beside the others from its first step on, however many they have done.
        at_work = [other for other in self._training if not other.at_rung]
        member.micro_batches = min((other.micro_batches for other in at_work), default=0)
        self._training.append(member)
        self._go(member)

    def _go(self, member: Member, answer: Any = None) -> None:
        assert member.turn is not None
        if member.at_rung:
            self._count_time()  # it has not been at work until now
        member.turn.go(answer)
        if member.turn.ended:
            self._count_time()
            self._training.remove(member)
            member.turn, member.layers = None, {}  # its stack would hold on to all it has seen
            (member.run_dir / rundir.CANCEL).unlink(missing_ok=True)
            gc.collect()  # its trainer, model and optimizer refer to one another

    def _compare(self) -> None:
        """All wait at rungs, those that are furthest behind at the same one: the best of these go on.

        With them count those that have been there before, in another pack or before a stop.
        """
        step = min(member.asks.step for member in self._training)
        there = [member for member in self._training if member.asks.step == step]
        settings = there[0].config.early_stop  # those of the sweep
        standings = recorded(there[0].run_dir.parent, step, settings)
        for member in there:
            self._go(member, judge(standings, member.run_dir.name, step=step, factor=settings.reduction_factor))

    def _step(self, at_work: Sequence[Member]) -> None:
        """A micro-batch of those that are furthest behind: all of them, unless one has just joined."""
        fewest = min(member.micro_batches for member in at_work)
        members = [member for member in at_work if member.micro_batches == fewest][: self.width]
        batches = [member.asks for member in members]
        try:
            step = self._forward(members, batches) if len(members) > 1 and can_join(batches) else None
        except Exception as error:  # each run says it, and what may help
            for member in members:
                self._go(member, error)
            return
        if step is None and self.width < len(members):  # it does not fit, and is tried with fewer
            return
        for member in members:
            member.micro_batches += 1
        self._micro_batches += len(members)
        if step is None:
            self._apart += len(members)
            for member in members:
                self._go(member, ALONE)
            return
        for member, part in zip(members, step.hidden, strict=True):
            self._go(member, part)
        answer: Exception | None = None
        try:
            step.backward()
        except RuntimeError as error:
            answer = self._too_many(members, error) if is_out_of_memory(error) else error
        for member in members:
            if member in self._training and not member.asks:
                self._go(member, answer)

    def _too_many(self, members: Sequence[Member], error: RuntimeError) -> OutOfMemory:
        """What each of them says whose gradients do not fit; fewer train at a time from now on."""
        self.width = max(len(members) // 2, 1)
        return OutOfMemory(
            f"the gradients of {len(members)} runs at a time do not fit: {reason(error)}. Fewer at a time may: "
            f"launcher.width={self.width}."
        )

    def _forward(self, members: Sequence[Member], batches: Sequence[dict[str, Any]]) -> JointStep | None:
        """A joint step; None, with a smaller width from now on, where memory does not suffice."""
        assert self._trunk is not None
        numbers = [member.state.random() for member in members]
        try:
            return self._trunk.forward(members, batches)
        except NotOfRows as error:
            self.width, why = 1, f"{error} is not given rows of tokens"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.width, why = len(members) // 2, f"no room for {len(members)} runs at a time"
        for member, before in zip(members, numbers, strict=True):
            member.state.set_random(before)
        self.say(f"{why}; {at_a_time(self.width)} from now on")
        return None


def _autocast(args: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Mixed precision as each run's own trainer enters it, without what holds on to that trainer."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return nullcontext if dtype is None else lambda: torch.autocast(args.device.type, dtype=dtype)


def shared_or_own(load: Callable[[], tuple[PreTrainedModel, list[int]]]) -> tuple[PreTrainedModel, list[int]]:
    """The base of the run that asks: that of its pack, or, for a run of its own, a newly loaded one."""
    member = _member.get()
    return load() if member is None else member.pack.base(load)


def join_pack(trainer: Any) -> None:
    """Have the steps of the run that asks be joint ones from now on, if it is one of a pack."""
    if member := _member.get():
        member.join(trainer)


def compare_in_pack() -> Compare | None:
    """How the run that asks is compared with those of its pack; None for a run of its own."""
    member = _member.get()
    return member.compare if member is not None else None


def seconds_of_device(seconds: float) -> float:
    """Of the seconds that the run which asks has been at work in this process, those in which it had the device."""
    member = _member.get()
    return seconds if member is None else member.pack.device_seconds(member)


def note_room(trainer: Any, *, before: int, needed: int, there: int) -> None:
    """Tell the pack of the run that asks what its longest batch takes (bytes): in use before it, at most, and there."""
    if (member := _member.get()) and member.pack.room is None:
        trained = [one for one in trainer.model.parameters() if one.requires_grad]
        weights = sum(one.numel() * one.element_size() for one in trained)
        kept = weights + optimizer_state(trainer.args.optim.value, trained)
        member.pack.room = Room(before=before, needed=needed, there=there, kept=kept)


def note_peak(device: torch.device) -> None:
    """Have the pack of the run that asks keep the process's peak so far, which a trial is about to measure anew."""
    if (member := _member.get()) and member.pack.has_begun:
        member.pack.peak = max(member.pack.peak, peak_memory(device))


def peak_of_process(device: torch.device) -> int:
    """Most bytes in use since the run began to train; for one of a pack, since the pack did, whose memory is one."""
    member = _member.get()
    return peak_memory(device) if member is None else max(peak_memory(device), member.pack.peak)
