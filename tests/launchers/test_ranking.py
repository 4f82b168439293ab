"""Which run of a sweep is best: the lowest loss, the highest share."""

from pathlib import Path

import pytest

from llmkit.config import TrainConfig
from llmkit.launchers.sweep import Job, Sweep


@pytest.mark.parametrize(
    ("objective", "best"),
    [
        ("eval_loss", 0.1),
        ("train_loss", 0.1),
        ("exact_match", 0.9),
        ("train_exact_match", 0.9),
        ("preference_accuracy", 0.9),
        ("train_preference_accuracy", 0.9),
    ],
)
def test_the_best_run_comes_first(objective, best):
    config = TrainConfig()
    jobs = [
        Job(overrides=[], run_dir=Path(str(value)), config=config, status="completed", objective=value)
        for value in (0.5, 0.9, None, 0.1, float("nan"))
    ]
    sweep = Sweep(directory=Path("sweep"), objective=objective, jobs_of_this_command=jobs, earlier=[])

    assert next(job.objective for job in sweep.ranked()) == best
    assert len(sweep.ranked()) == 3
