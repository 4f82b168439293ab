"""Kill runs at any moment and see that nothing is lost: make chaos, or .venv/bin/python tests/chaos [--kills N] ...

Every case (cases.py) is run once without disturbance, the reference. Then, over and over, the same run is

1. killed by SIGKILL at random moments, spread evenly over its duration, and started again each time;
2. killed at every file boundary (boundaries.py) between the moment its last but one checkpoint has got its name and its
   end: taking up that checkpoint, a save with the removal of old ones, and the delivery of the model;
3. started with its newest checkpoint damaged (damage.py).

Each of these runs has to come to its end without help, and to end as the reference did, bit for bit (comparison.py):
weights, optimizer, scheduler and random states, and every value in metrics.jsonl, samples.jsonl and result.json that is
no timing. After every kill the newest committed checkpoint has to be whole and loadable.

Runs are forks of one process that has imported everything (lives.py). With --cold the reference is an ordinary worker
in a process of its own, and a fork that is left in peace is compared with it. A trial that fails leaves its folder,
with the log of its run, below the directory that is named at the end; the exit code is 1 then.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from cases import CASES, config_of
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from trials import Reference, Trial

CHECKOUT = Path(__file__).parents[2]
KILLS_OF_A_RUN = 3  # at random moments


def main() -> int:
    """Returns the exit code."""
    chosen = parse_options()
    scratch = Path(tempfile.mkdtemp(prefix="chaos_"))
    os.environ |= closed_world(scratch)  # before anything heavy is imported, which reads it then
    began = time.monotonic()
    trials = run_trials(chosen, scratch)
    score = {case: score_of([trial for trial in trials if trial.case == case]) for case in chosen.case}
    failed = [trial for trial in trials if trial.failed]
    seconds = time.monotonic() - began
    show(score, failed, seconds=seconds)
    if chosen.json:
        write(chosen.json, score, failed, seed=chosen.seed, seconds=seconds)
    if failed:
        print(f"What they left is in {scratch}")
        return 1
    shutil.rmtree(scratch)
    return 0


def parse_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    options.add_argument("--kills", type=int, default=108, help="at random moments, over all cases (default 108)")
    options.add_argument("--boundaries", type=int, help="file boundaries to kill each case at (default: all there are)")
    options.add_argument("--damages", type=int, default=12, help="damaged checkpoints of each case (default 12)")
    options.add_argument("--seed", type=int, default=0, help="of moments and damages (default 0)")
    options.add_argument("--case", action="append", choices=CASES, help="only this case; may be given again")
    options.add_argument("--cold", action="store_true", help="references from fresh processes")
    options.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time (default: cores)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the score there")
    chosen = options.parse_args()
    chosen.case = list(dict.fromkeys(chosen.case or CASES))
    return chosen


def closed_world(scratch: Path) -> dict[str, str]:
    """The environment of all runs: this checkout, caches of their own, no network, one thread each.

    With one thread a fork needs none of the threads that its parent had, and runs do not disturb one another.
    """
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        "LLMKIT_CACHE": str(scratch / "llmkit"),
        "HF_HOME": str(scratch / "huggingface"),
        "MPLCONFIGDIR": str(scratch / "matplotlib"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_trials(chosen: argparse.Namespace, scratch: Path) -> "list[Trial]":
    """All trials of all cases, `chosen.jobs` at a time; those of a case begin once its reference is there."""
    from lives import warm_up

    warm_up(config_of("qlora"))  # which needs most; first of all, as it decides which libraries are seen
    from trials import make_reference

    fork = get_context("fork")
    trials: list[Trial] = []
    running: list[Future[list[Trial]]] = []
    with ProcessPoolExecutor(chosen.jobs, mp_context=fork, initializer=end_with, initargs=(os.getpid(),)) as pool:
        begun = [pool.submit(make_reference, case, scratch / case, cold=chosen.cold) for case in chosen.case]
        for ready in as_completed(begun):
            reference, undisturbed = ready.result()
            trials += undisturbed
            running += [pool.submit(trial, reference, **its) for trial, its in planned(chosen, reference)]
        for number, done in enumerate(as_completed(running), start=1):
            trials += done.result()
            if number % 50 == 0:
                print(f"{number} of {len(running)} done", flush=True)
    return trials


def end_with(parent: int) -> None:
    """No process stays behind if this one is killed."""
    from llmkit.processes import die_with_parent

    die_with_parent(parent, signal.SIGKILL)


def planned(chosen: argparse.Namespace, reference: "Reference") -> "Iterator[tuple[Callable[..., list[Trial]], dict]]":
    """Which trials a case gets, with their arguments."""
    from trials import damage_newest, kill_at_boundary, kill_at_random

    cases = chosen.case
    kills = chosen.kills // len(cases) + (cases.index(reference.case) < chosen.kills % len(cases))
    for number, first in enumerate(range(0, kills, KILLS_OF_A_RUN)):
        most = min(KILLS_OF_A_RUN, kills - first)
        yield kill_at_random, {"number": number, "seed": chosen.seed, "kills": most}
    there = reference.boundaries
    wanted = there if chosen.boundaries is None else min(chosen.boundaries, there)
    draw = random.Random(f"{chosen.seed} {reference.case}")
    for number in sorted(draw.sample(range(1, there + 1), wanted)):
        yield kill_at_boundary, {"number": number}
    for number in range(chosen.damages):
        yield damage_newest, {"number": number, "seed": chosen.seed}


def score_of(trials: "list[Trial]") -> dict[str, int]:
    """What was tried and what came of it."""
    return {
        "kills": sum(trial.kills for trial in trials if trial.kind == "kills"),
        "boundary_kills": sum(trial.kills for trial in trials if trial.kind == "boundary"),
        "damages": sum(trial.kind == "damage" for trial in trials),
        "trials": len(trials),
        "survived": sum(not trial.problems for trial in trials),
        "identical": sum(not trial.failed for trial in trials),
    }


def show(score: dict[str, dict[str, int]], failed: "list[Trial]", *, seconds: float) -> None:
    """The table, and what went wrong."""
    table = Table("case", "kills", "boundary kills", "damages", "trials", "survived", "identical")
    for case, counts in score.items():
        table.add_row(case, *map(str, counts.values()))
    table.add_section()
    columns = zip(*(counts.values() for counts in score.values()), strict=True)
    table.add_row("all", *(str(sum(column)) for column in columns))
    console = Console(soft_wrap=True, highlight=False)
    for trial in failed:
        console.print(f"{trial.case}, {trial.kind}, {trial.what} ({trial.folder.name}):", style="bold", markup=False)
        for line in [*trial.problems, *trial.differences]:
            console.print(f"  {line}", markup=False)
    console.print(table)
    console.print(f"{seconds / 60:.1f} minutes")


def write(file: Path, score: dict[str, dict[str, int]], failed: "list[Trial]", *, seed: int, seconds: float) -> None:
    """The same as JSON."""
    failures = [
        {"case": one.case, "kind": one.kind, "what": one.what, "problems": one.problems, "differences": one.differences}
        for one in failed
    ]
    content = {"seed": seed, "seconds": round(seconds, 1), "cases": score, "failures": failures}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
