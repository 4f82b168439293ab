"""The trials: a run is killed or its checkpoint damaged, goes on, and has to end as the run that nobody disturbed."""

import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from boundaries import Boundaries
from cases import config_of
from comparison import differences, unreadable
from damage import DAMAGES
from lives import LOG, Life, copy_run, newest_step, run_in_fresh_process

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.training.checkpoints import manifest

JOURNAL = "journal.txt"  # of the operations on files, beside the run directory


@dataclass
class Trial:
    """One run that was disturbed, and what came of it."""

    case: str
    kind: str  # undisturbed, kills, boundary or damage
    what: str
    folder: Path
    kills: int = 0
    problems: list[str] = field(default_factory=list)  # what kept it from going on as it should
    differences: list[str] = field(default_factory=list)  # from the reference

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def failed(self) -> bool:
        return bool(self.problems or self.differences)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        result = rundir.read_result(self.run_dir)
        return result is not None and result["status"] == "completed"

    def log(self) -> list[str]:
        """All that the run has said, over all its lives."""
        return (self.folder / LOG).read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Reference:
    """A case's undisturbed run, and that run as it was when its last but one checkpoint had just got its name."""

    case: str
    folder: Path  # of the case
    config: TrainConfig
    run_dir: Path
    middle: Path
    boundaries: int  # operations on files from `middle` to the end
    start_up: float  # seconds, until the first step is done
    training: float  # seconds, for everything after

    def seconds_left(self, step: int) -> float:
        """What is left of `training` at a step."""
        assert self.config.training.max_steps
        return self.training * (1 - step / self.config.training.max_steps)


def make_reference(case: str, folder: Path, *, cold: bool) -> tuple[Reference, list[Trial]]:
    """Run a case undisturbed. Raises RuntimeError with the log if not even that works.

    Args:
        cold: the reference is an ordinary worker in a fresh process; a fork that is not disturbed is the first trial.
    """
    config = config_of(case)
    first, again = (Trial(case, "undisturbed", what, folder / what) for what in ("worker", "fork"))
    if cold:
        first.folder.mkdir(parents=True)
        _expect(run_in_fresh_process(config, first.run_dir), 0, first)
    again.folder.mkdir(parents=True)
    life = Life(config, again.run_dir)
    metrics = again.run_dir / rundir.METRICS
    life.wait(lambda: metrics.exists() and b'"loss"' in metrics.read_bytes())
    start_up = life.seconds()
    life.wait()
    _expect(life.exit_code, 0, again)
    training = life.seconds() - start_up
    if cold:
        again.differences = differences(first.run_dir, again.run_dir)
    middle = _stop_in_the_middle(config, Trial(case, "undisturbed", "middle", folder / "middle"))
    boundaries = _count_boundaries(config, middle, Trial(case, "undisturbed", "counted", folder / "counted"))
    reference = Reference(
        case, folder, config, (first if cold else again).run_dir, middle, boundaries, start_up, training
    )
    return reference, [again] if cold else []


def _stop_in_the_middle(config: TrainConfig, trial: Trial) -> Path:
    trial.folder.mkdir()
    every, steps = int(config.training.save_steps or 1), config.training.max_steps or 0
    name = manifest.name_of(range(every, steps + 1, every)[-2])
    boundaries = Boundaries(trial.run_dir, trial.folder / JOURNAL, kill_behind=name)
    life = Life(config, trial.run_dir, within=boundaries.watch)
    life.wait()
    _expect(life.exit_code, -signal.SIGKILL, trial)
    return trial.run_dir


def _count_boundaries(config: TrainConfig, middle: Path, trial: Trial) -> int:
    copy_run(middle, trial.run_dir)
    boundaries = Boundaries(trial.run_dir, trial.folder / JOURNAL)
    life = Life(config, trial.run_dir, within=boundaries.watch)
    life.wait()
    _expect(life.exit_code, 0, trial)
    return len((trial.folder / JOURNAL).read_bytes().splitlines())


def _expect(exit_code: int | None, expected: int, trial: Trial) -> None:
    if exit_code != expected:
        raise RuntimeError(f"{trial.case}, undisturbed: exit code {exit_code}\n" + "\n".join(trial.log()))


def kill_at_random(reference: Reference, *, number: int, seed: int, kills: int) -> list[Trial]:
    """A run that is killed `kills` times, at moments spread evenly over what is left of it; more runs if it takes them.

    Args:
        number: of this group of kills among those of the case.
    """
    draw = random.Random(f"{seed} {reference.case} {number}")
    trials: list[Trial] = []
    # A run may be faster than the reference and end before its moment comes.
    while (left := kills - sum(trial.kills for trial in trials)) > 0 and len(trials) < 10 * kills:
        name = f"kills-{number}-{len(trials)}"
        trial = Trial(reference.case, "kills", f"group {number}, run {len(trials)}", reference.folder / name)
        trial.folder.mkdir()
        _kill_again_and_again(trial, reference, draw, most=left)
        trials.append(_settle(trial, reference))
    return trials


def _kill_again_and_again(trial: Trial, reference: Reference, draw: random.Random, *, most: int) -> None:
    """A life may be killed before it has saved anything, while it takes up its checkpoint too; but not two in a row."""
    newest, progressed = 0, True
    while trial.kills < most and not trial.finished:
        life = Life(reference.config, trial.run_dir)
        _kill_some_time(life, trial, reference, draw, behind=None if progressed else newest)
        _note_end(life, trial)
        progressed, newest = newest_step(trial.run_dir) > newest, newest_step(trial.run_dir)


def _kill_some_time(life: Life, trial: Trial, reference: Reference, draw: random.Random, *, behind: int | None) -> None:
    """Kill it at any moment, or any after it has committed a newer checkpoint than `behind`; it may end before."""
    start_up = reference.start_up
    if behind is not None:
        life.wait(lambda: newest_step(trial.run_dir) > behind)
        start_up = 0.0
    left = start_up + reference.seconds_left(newest_step(trial.run_dir))
    moment = life.seconds() + draw.uniform(0, left)
    if life.wait(lambda: life.seconds() >= moment):
        life.kill()


def kill_at_boundary(reference: Reference, *, number: int) -> list[Trial]:
    """From the middle on, killed at the operation on files of that number."""
    trial = Trial(reference.case, "boundary", f"number {number}", reference.folder / f"boundary-{number}")
    copy_run(reference.middle, trial.run_dir)
    journal = trial.folder / JOURNAL
    life = Life(reference.config, trial.run_dir, within=Boundaries(trial.run_dir, journal, kill_at=number).watch)
    life.wait()
    last = journal.read_text(encoding="utf-8").splitlines()[-1]
    trial.what += f": {last.replace(str(trial.run_dir), '')}"
    _note_end(life, trial)
    return [_settle(trial, reference)]


def damage_newest(reference: Reference, *, number: int, seed: int) -> list[Trial]:
    """From the middle on, the newest checkpoint damaged; in every second round of damages all that there are."""
    draw = random.Random(f"{seed} {reference.case} {number}")
    harm, everywhere = DAMAGES[number % len(DAMAGES)], bool(number // len(DAMAGES) % 2)
    what = harm.__name__.replace("_", " ") + (" in every checkpoint" if everywhere else "")
    trial = Trial(reference.case, "damage", what, reference.folder / f"damage-{number}")
    copy_run(reference.middle, trial.run_dir)
    there = manifest.committed(trial.run_dir)
    newest = there[-1].name
    for checkpoint in there if everywhere else there[-1:]:
        harm(checkpoint, draw)
    life = Life(reference.config, trial.run_dir)
    life.wait()
    _note_end(life, trial)
    if not any(line.startswith("warning") and newest in line for line in trial.log()):
        trial.problems.append(f"no warning of what is wrong with {newest}")
    if any(line.startswith("resume") and line.endswith(newest) for line in trial.log()):
        trial.problems.append(f"it went on from {newest}")
    return [_settle(trial, reference)]


def _note_end(life: Life, trial: Trial) -> None:
    """Of a life that was killed or not: was that all that went wrong, and can its newest checkpoint be loaded?"""
    if life.hung:
        trial.problems.append("it did not end")
    elif life.exit_code == -signal.SIGKILL:
        trial.kills += 1
        newest = manifest.latest(trial.run_dir)
        if newest is not None and (problem := unreadable(newest)):
            trial.problems.append(problem)
    elif life.exit_code != 0:
        last = next((line for line in reversed(trial.log()) if line), "")
        trial.problems.append(f"exit code {life.exit_code}: {last}")


def _settle(trial: Trial, reference: Reference) -> Trial:
    """Let the run go on to its end and compare it with the reference. What went well leaves no files."""
    if not trial.finished:
        life = Life(reference.config, trial.run_dir)
        life.wait()
        _note_end(life, trial)
    if trial.finished:
        trial.differences = differences(reference.run_dir, trial.run_dir)
    else:
        trial.problems.append("it did not come to its end")
    if not trial.failed:
        shutil.rmtree(trial.folder)
    return trial
