"""`early_stop=halving`: at each rung the runs of a sweep are compared on held-out rows; those behind stop there.

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
from llmkit.config.sweeper_schema import EarlyStopConfig
from llmkit.training.arguments import whole_steps
from llmkit.training.ranks import on_main

Compare: TypeAlias = Callable[[int], "Verdict | None"]  # step, its figures being recorded -> where the run stands
Standing: TypeAlias = tuple[float, ...]  # what runs are ordered by, the least first; the second between equal firsts


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
    steps = []
    step = whole_steps(settings.min_steps, total)
    while step < total:
        steps.append(step)
        step *= settings.reduction_factor
    return steps


def judge(standings: Mapping[str, Standing], name: str, *, step: int, factor: int) -> Verdict:
    """Where the run of that name stands among all: one in `factor` goes on, and at least one."""
    unknown = {one for one, standing in standings.items() if not all(map(math.isfinite, standing))}
    order = sorted(standings, key=lambda one: (one in unknown, standings[one], one))
    place = order.index(name) + 1
    goes_on = place <= max(len(order) // factor, 1) and name not in unknown
    return Verdict(step=step, place=place, of=len(order), goes_on=goes_on)


def compares(run_dir: Path) -> bool:
    """Whether there are other runs to compare one with: only in a sweep."""
    return (run_dir.parent / rundir.SWEEP).exists()


def record(run_dir: Path, step: int, figures: Mapping[str, float], *, goes_on: bool | None = None) -> None:
    """Write down what a run had at a rung."""
    earlier = rundir.read_json(run_dir / rundir.RUNGS) or {}
    rundir.write_json(run_dir / rundir.RUNGS, earlier | {str(step): {**figures, "goes_on": goes_on}})


def forget(run_dir: Path, step: int) -> None:
    """Take that back: the run has left the rung before it was compared."""
    rungs = rundir.read_json(run_dir / rundir.RUNGS) or {}
    rundir.write_json(run_dir / rundir.RUNGS, {at: found for at, found in rungs.items() if at != str(step)})


def recorded(sweep: Path, step: int, settings: EarlyStopConfig) -> dict[str, Standing]:
    """How the runs of a sweep stand that have been at the rung after that step, by their names."""
    metric = settings.metric
    assert metric is not None, "resolved"
    paths = [path for path in sweep.glob(f"*/{rundir.RUNGS}") if not rundir.is_aside(path.parent)]
    at_step = {path.parent.name: (rundir.read_json(path) or {}).get(str(step), {}) for path in paths}
    return {name: _standing(figures, metric) for name, figures in at_step.items() if metric in figures}


def _standing(figures: Mapping[str, float], metric: str) -> Standing:
    """The loss; or of another figure more is better, and between equal ones the loss decides."""
    loss = figures["eval_loss"]
    return (loss,) if metric == "eval_loss" else (-figures[metric], loss)


class RungFiles:
    """Compares a run with those of its sweep that have been at a rung before it, by what their directories say."""

    def __init__(self, run_dir: Path, settings: EarlyStopConfig):
        self.run_dir, self.settings = run_dir, settings

    def __call__(self, step: int) -> Verdict:
        standings = recorded(self.run_dir.parent, step, self.settings)
        return judge(standings, self.run_dir.name, step=step, factor=self.settings.reduction_factor)


class Behind(Exception):
    """The run is not to train on from the step at which it was taken up."""


class Rungs(TrainerCallback):
    """Evaluates at each rung, has the run compared, and stops it, saved, if it is behind.

    Args:
        compare: where the run stands; None if it is to stop, saved, before that is known.
        loss_at: the held-out loss that was measured at a step, for a run that is taken up at a rung.
        measure: what runs are compared by beside the loss, of the model as it is at a rung.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: list[int],
        compare: Compare,
        loss_at: Callable[[int], float | None],
        measure: Callable[[], dict[str, float]] = dict,
    ):
        self.run_dir, self.steps, self.compare = run_dir, steps, compare
        self.loss_at, self.measure = loss_at, measure
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
        figures = {"eval_loss": loss, **self.measure()}
        verdict, goes_on = on_main(lambda: self._compared(step, figures))
        self.verdict = None if goes_on else verdict
        return goes_on

    def _compared(self, step: int, figures: Mapping[str, float]) -> tuple[Verdict | None, bool]:
        known = (rundir.read_json(self.run_dir / rundir.RUNGS) or {}).get(str(step), {})
        if known.get("goes_on"):  # and was stopped later on, before its next checkpoint
            return None, True
        record(self.run_dir, step, figures)
        verdict = self.compare(step)
        if verdict is None:
            forget(self.run_dir, step)
            return None, False
        record(self.run_dir, step, figures, goes_on=verdict.goes_on)
        return verdict, verdict.goes_on
