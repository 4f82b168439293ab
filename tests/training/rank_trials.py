"""Stop runs of several ranks at any moment: .venv/bin/python tests/training/rank_trials.py [--trials N] [--ranks R]

A run under torchrun (two_ranks.py) gets a signal at a random moment: as soon as its ranks heed signals, within a step,
in the middle of an evaluation or of a save; sent to one rank, to all, to torchrun, or to all of them at once as a
scheduler does. All ranks then have to end at the same step, and the checkpoint of that step has to be whole and hold
the states of every rank. The run goes on, is stopped again, and after a few stops is left to end: bit for bit as a run
that nobody disturbed. Prints the score; the exit code is 1 if a trial failed.
"""

import argparse
import functools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "tests" / "chaos"))

from comparison import differences, unreadable  # noqa: E402
from train_config import config_of  # noqa: E402
from transformers.trainer import TRAINER_STATE_NAME  # noqa: E402
from two_ranks import EVENTS  # noqa: E402

from llmkit.config import save  # noqa: E402
from llmkit.errors import EXIT_DONE, EXIT_PREEMPTED  # noqa: E402
from llmkit.processes import die_with_parent  # noqa: E402
from llmkit.training.checkpoints import manifest  # noqa: E402
from llmkit.training.checkpoints.contents import ACCUMULATORS  # noqa: E402

STEPS = 40
WORDS = (
    *("model=tiny", "data=demo", "method=lora", "lora.lora_dropout=0.1", "hardware=cpu", "precision=fp32"),
    *(f"training.max_steps={STEPS}", "training.save_steps=4", "training.eval_steps=3", "training.logging_steps=5"),
    *("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"),
)
MOMENTS = ("start", "step", "evaluation", "save")
TARGETS = ("one rank", "all ranks", "torchrun", "everything")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOPS_OF_A_RUN = 4
HANGS_AFTER = 600.0  # seconds; far more than an undisturbed run takes on a busy machine
POLL_SECONDS = 0.002


@dataclass
class Trial:
    """A signal to a run under torchrun, and what came of it."""

    moment: str  # of MOMENTS
    target: str  # of TARGETS
    signal: signal.Signals
    after: int  # how many such moments pass by before
    delay: float  # seconds from the moment to the signal
    rank: int  # if only one gets it
    step: int | None = None  # at which all ranks ended
    saved: float = 0.0  # seconds from the signal until all ranks know that it is saved
    seconds: float = 0.0  # from the signal to the end of all processes
    evaluation_pending: bool = False  # one was cut off
    missed: bool = False  # the run ended before its moment came
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sent = f"{self.signal.name} to {self.target}, {self.moment} {self.after}"
        cut_off = ", evaluation cut off" if self.evaluation_pending else ""
        return f"{sent}: step {self.step}{cut_off}, saved in {self.saved:.1f} s, ended in {self.seconds:.1f} s"


class Group:
    """torchrun and its ranks at work on a run directory."""

    def __init__(self, run_dir: Path, ranks: int):
        self.folder, self.ranks = run_dir.parent, ranks
        for left in (*self.folder.glob("rank-*"), self.folder / EVENTS):
            left.unlink(missing_ok=True)
        # By default torchrun dies of SIGUSR1 and leaves its ranks behind.
        handled = ",".join(number.name for number in SIGNALS)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(ranks), "--signals-to-handle", handled]
        with (self.folder / "log.txt").open("a") as log:
            self.torchrun = subprocess.Popen(
                [*command, str(CHECKOUT / "tests" / "training" / "two_ranks.py"), str(run_dir)],
                env=os.environ | closed_world(),
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=functools.partial(die_with_parent, os.getpid(), signal.SIGKILL),
            )
        self.began = time.monotonic()

    def wait_for(self, moment: str, after: int) -> bool:
        """Return at the moment of that name that comes after so many of its kind; False if the group ends before."""
        while self.torchrun.poll() is None and not self._is_at(moment, after):
            self._end_if_hung()
            time.sleep(POLL_SECONDS)
        return self.torchrun.poll() is None

    def _is_at(self, moment: str, after: int) -> bool:
        if moment == "start":
            return len(self._pids()) == self.ranks
        events = self.folder / EVENTS
        return events.exists() and events.read_text(encoding="utf-8").split().count(moment) > after

    def send(self, trial: Trial) -> None:
        """Send the trial's signal to whom it is for."""
        pids = self._pids()
        receivers = [pids[trial.rank]] if trial.target == "one rank" else list(pids.values())
        if trial.target == "torchrun":
            receivers = []
        if trial.target in ("torchrun", "everything"):
            receivers.append(self.torchrun.pid)
        for pid in receivers:
            try:
                os.kill(pid, trial.signal)
            except ProcessLookupError:  # it has ended by itself
                continue

    def wait(self) -> list[dict[str, Any]]:
        """What each rank said when it ended, those that said nothing left out. Raises TimeoutError if they hang."""
        while self.torchrun.poll() is None:
            self._end_if_hung()
            time.sleep(POLL_SECONDS)
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("rank-*.json"))]

    def last_word(self) -> float:
        """When the last rank said how it ended, as time.time() counts."""
        return max((file.stat().st_mtime for file in self.folder.glob("rank-*.json")), default=math.nan)

    def _pids(self) -> dict[int, int]:
        files = self.folder.glob("rank-*.pid")
        return {int(file.stem.removeprefix("rank-")): int(file.read_text(encoding="utf-8")) for file in files}

    def _end_if_hung(self) -> None:
        if time.monotonic() - self.began > HANGS_AFTER:
            self.torchrun.kill()  # the ranks die with it
            self.torchrun.wait()
            raise TimeoutError(f"no end after {HANGS_AFTER:.0f} s")


def closed_world() -> dict[str, str]:
    """The environment of all ranks: this checkout, one thread each, no network but the loopback device."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def new_run(folder: Path, *words: str) -> Path:
    """A run directory that has nothing but its config, which `words` may change."""
    run_dir = folder / "run"
    run_dir.mkdir(parents=True)
    save(config_of(*WORDS, *words), run_dir)
    return run_dir


def finish(run_dir: Path, ranks: int, *, steps: int = STEPS) -> None:
    """Let a run go on to its end. Raises RuntimeError with its log if it does not come there."""
    ended = Group(run_dir, ranks).wait()
    if [(rank["step"], rank["exit_code"]) for rank in ended] != [(steps, EXIT_DONE)] * ranks:
        raise RuntimeError(f"{ended}\n" + (run_dir.parent / "log.txt").read_text(encoding="utf-8"))


def draw_trials(seed: int, ranks: int) -> Iterator[Trial]:
    """Trials without end; every four are at the four moments, every sixteen have all pairs of moment and target."""
    draw, number = random.Random(f"{seed} {ranks}"), 0
    while True:
        yield Trial(
            moment=MOMENTS[number % 4],
            target=TARGETS[(number + number // 4) % 4],
            signal=draw.choice(SIGNALS),
            after=draw.randrange(4),
            delay=draw.uniform(0, 0.02),
            rank=draw.randrange(ranks),
        )
        number += 1


def stop_again_and_again(run_dir: Path, ranks: int, trials: list[Trial]) -> list[Trial]:
    """Have each trial in turn stop a run that goes on from where the one before has stopped it.

    Returns those that were made: all, unless one failed or the run came to its end.
    """
    for number, trial in enumerate(trials, start=1):
        _stop(run_dir, ranks, trial)
        if trial.missed or trial.problems:
            return trials[:number]
    return trials


def go_on_to_the_end(run_dir: Path, ranks: int, reference: Path) -> list[str]:
    """Let a stopped run end; returns what distinguishes it from the reference then."""
    try:
        finish(run_dir, ranks)
    except (RuntimeError, TimeoutError) as error:
        return [f"it does not go on: {error}"]
    return [*differences(reference, run_dir), *_unlike_history(reference, run_dir)]


def _stop(run_dir: Path, ranks: int, trial: Trial) -> None:
    group = Group(run_dir, ranks)
    try:
        if group.wait_for(trial.moment, trial.after):
            time.sleep(trial.delay)
            group.send(trial)
        sent = time.time()
        ended = group.wait()
    except TimeoutError as error:
        trial.problems.append(str(error))
        return
    trial.seconds = time.time() - sent
    trial.saved = group.last_word() - sent
    steps = {rank["step"] for rank in ended}
    trial.step = min(steps, default=None)
    trial.missed = [rank["exit_code"] for rank in ended] == [EXIT_DONE] * ranks
    if len(ended) != ranks or len(steps) != 1:
        trial.problems.append(f"the ranks ended like this: {ended}")
    elif not trial.missed:
        trial.problems += _problems_of_stop(run_dir, ranks, ended)
        newest = manifest.latest(run_dir)
        trial.evaluation_pending = newest is not None and manifest.read_manifest(newest)["evaluation_pending"]


def _problems_of_stop(run_dir: Path, ranks: int, ended: list[dict[str, Any]]) -> Iterator[str]:
    if {rank["exit_code"] for rank in ended} != {EXIT_PREEMPTED}:
        yield f"exit codes: {[rank['exit_code'] for rank in ended]}"
    newest = manifest.latest(run_dir)
    if newest is None or manifest.step_of(newest) != ended[0]["step"]:
        yield f"stopped at step {ended[0]['step']}, and the newest checkpoint is {newest and newest.name}"
        return
    if damage := unreadable(newest):
        yield damage
    states = sorted(path.name for path in newest.glob("rng_state*"))
    if states != (["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]):
        yield f"random states in the checkpoint: {states}"
    if len(json.loads((newest / ACCUMULATORS).read_text(encoding="utf-8"))) != ranks:
        yield f"{ACCUMULATORS} is not of {ranks} ranks"


def _unlike_history(reference: Path, run: Path) -> Iterator[str]:
    for ours, theirs in zip_longest(_history(reference), _history(run)):
        if ours != theirs:
            yield f"logged: {theirs} instead of {ours}"
            return


def _history(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged, timings aside."""
    newest = manifest.latest(run_dir)
    assert newest
    records = json.loads((newest / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    timed = ("runtime", "per_second")
    return [{key: value for key, value in record.items() if not key.endswith(timed)} for record in records]


def main() -> int:
    """Returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    options.add_argument("--trials", type=int, default=20, help="how many stops (default 20)")
    options.add_argument("--ranks", type=int, default=2, help="processes of a run (default 2)")
    options.add_argument("--seed", type=int, default=0, help="of signals and moments (default 0)")
    chosen = options.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="ranks_"))
    os.environ |= {"LLMKIT_CACHE": str(scratch / "llmkit"), "HF_HOME": str(scratch / "huggingface")}
    reference = new_run(scratch / "reference")
    finish(reference, chosen.ranks)
    drawn, done = draw_trials(chosen.seed, chosen.ranks), []
    while (left := chosen.trials - sum(not trial.missed for trial in done)) > 0:
        run_dir = new_run(scratch / f"run-{len(done)}")
        trials = [next(drawn) for _ in range(min(left, STOPS_OF_A_RUN))]
        made = stop_again_and_again(run_dir, chosen.ranks, trials)
        if not made[-1].problems:
            made[-1].problems = go_on_to_the_end(run_dir, chosen.ranks, reference)
        for trial in made:
            print(f"{trial}{' (missed)' if trial.missed else ''}", *trial.problems, sep="\n  ", flush=True)
        done += made
    return show(done, scratch)


def show(trials: list[Trial], scratch: Path) -> int:
    """Print the score; returns the exit code."""
    tried = [trial for trial in trials if not trial.missed]
    failed = [trial for trial in trials if trial.problems]
    cut_off = sum(trial.evaluation_pending for trial in tried)
    print(f"{len(tried)} stops, {len(failed)} failed; {cut_off} cut an evaluation off")
    for what, values in (("saved", [it.saved for it in tried]), ("ended", [it.seconds for it in tried])):
        print(f"from signal to {what}: median {statistics.median(values):.1f} s, longest {max(values):.1f} s")
    if failed:
        print(f"What they left is in {scratch}")
        return 1
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
