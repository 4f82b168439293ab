"""`early_stop=halving`: at each rung the runs of a sweep are compared by their held-out loss; those behind stop there.

Runs that train together (launcher=packed) wait for one another at a rung, and one in `reduction_factor` goes on:
successive halving (Jamieson and Talwalkar, arXiv 1502.07943). Runs that start one after the other, or on other
machines, do not wait: each is compared with those that were there before it (ASHA, Li et al., arXiv 1810.05934).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import TrainerCallback

from llmkit import rundir
from llmkit.config.schema import EarlyStopConfig
from llmkit.training.ranks import on_main

RUNGS = "rungs.json"  # in a run's directory: its loss after each rung's step, and whether it went on; null while open

Compare: TypeAlias = Callable[[int, float], "Verdict | None"]  # step, held-out loss -> where the run stands


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Where a run stands at a rung, among those that have been there."""

    step: int
    place: int  # from 1
    of: int
    goes_on: bool

    def in_words(self) -> str:
        """Why a run stops here."""
        return f"early_stop=halving: place {self.place} of {self.of} at step {self.step}"


def rung_steps(settings: EarlyStopConfig, total: int) -> list[int]:
    """The steps at which a run of `total` steps is compared with the others; none at its end."""
    first = settings.min_steps * total if settings.min_steps < 1 else settings.min_steps
    steps = []
    step = max(math.ceil(first), 1)
    while step < total:
        steps.append(step)
        step *= settings.reduction_factor
    return steps


def judge(losses: Mapping[str, float], name: str, *, step: int, factor: int) -> Verdict:
    """Where the run of that name stands among `losses`: one in `factor` goes on, and at least one."""
    order = sorted(losses, key=lambda one: (not math.isfinite(losses[one]), losses[one], one))
    place = order.index(name) + 1
    goes_on = place <= max(len(order) // factor, 1) and math.isfinite(losses[name])
    return Verdict(step=step, place=place, of=len(order), goes_on=goes_on)


def compares(run_dir: Path) -> bool:
    """Whether there are other runs to compare one with: only in a sweep."""
    return (run_dir.parent / rundir.SWEEP).exists()


def record(run_dir: Path, step: int, loss: float, *, goes_on: bool | None = None) -> None:
    """Write down what a run had at a rung."""
    earlier = rundir.read_json(run_dir / RUNGS) or {}
    rundir.write_json(run_dir / RUNGS, earlier | {str(step): {"loss": loss, "goes_on": goes_on}})


def recorded(sweep: Path, step: int) -> dict[str, float]:
    """The losses of a sweep's runs that have been at the rung after that step, by their names."""
    found = {path.parent.name: rundir.read_json(path) or {} for path in sweep.glob(f"*/{RUNGS}")}
    return {name: rungs[str(step)]["loss"] for name, rungs in found.items() if str(step) in rungs}


class RungFiles:
    """Compares a run with those of its sweep that have been at a rung before it, by what their directories say."""

    def __init__(self, run_dir: Path, *, factor: int):
        self.run_dir, self.factor = run_dir, factor

    def __call__(self, step: int, loss: float) -> Verdict:
        record(self.run_dir, step, loss)
        return judge(recorded(self.run_dir.parent, step), self.run_dir.name, step=step, factor=self.factor)


class Behind(Exception):
    """The run is not to train on from the step at which it was taken up."""


class Rungs(TrainerCallback):
    """Evaluates at each rung, has the run compared, and stops it, saved, if it is behind.

    Args:
        compare: where the run stands; None if it is to stop, saved, before that is known.
        loss_at: the held-out loss that was measured at a step, for a run that is taken up at a rung.
    """

    def __init__(self, run_dir: Path, steps: list[int], compare: Compare, loss_at: Callable[[int], float | None]):
        self.run_dir, self.steps, self.compare, self.loss_at = run_dir, steps, compare, loss_at
        self.verdict: Verdict | None = None  # of the rung at which the run has been stopped
        self._has_trained = False  # since it was taken up: until then its checkpoint holds all there is

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in self.steps or (loss := self.loss_at(state.global_step)) is None:
            return
        if not self._goes_on(state.global_step, loss):
            raise Behind

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._has_trained = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate |= state.global_step in self.steps

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.nan)
        if state.global_step not in self.steps or self._goes_on(state.global_step, loss):
            return
        if not self._has_trained:  # an evaluation that was made up for
            raise Behind
        control.should_save = control.should_training_stop = True

    def _goes_on(self, step: int, loss: float) -> bool:
        """On all ranks what the first one finds: other runs may come to the rung between two looks."""
        verdict, goes_on = on_main(lambda: self._compared(step, loss))
        self.verdict = None if goes_on else verdict
        return goes_on

    def _compared(self, step: int, loss: float) -> tuple[Verdict | None, bool]:
        known = (rundir.read_json(self.run_dir / RUNGS) or {}).get(str(step), {})
        if known.get("goes_on"):  # and was stopped later on, before its next checkpoint
            return None, True
        verdict = self.compare(step, loss)
        if verdict is not None:
            record(self.run_dir, step, loss, goes_on=verdict.goes_on)
        return verdict, verdict is not None and verdict.goes_on
