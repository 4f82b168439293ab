"""Which run of a sweep is best: the lowest loss, the highest share."""

from pathlib import Path

import pytest

from llmkit import rundir
from llmkit.config import TrainConfig, save
from llmkit.config.schema import CheckpointConfig, ExportConfig, LoraConfig
from llmkit.launchers.job_record import ENDED, JobRecord
from llmkit.launchers.ranking import print_ranking
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


def test_values_in_brackets_are_shown_as_they_are(capsys):
    jobs = [
        Job(
            overrides=[f"lora.target_modules={value}"],
            run_dir=Path(value),
            config=TrainConfig(),
            status="completed",
            objective=1.0,
        )
        for value in ("[q_proj]", "[q_proj,v_proj]")
    ]

    print_ranking(Sweep(directory=Path("[mine]"), objective="eval_loss", jobs_of_this_command=jobs, earlier=[]))

    said = capsys.readouterr().out
    assert "[mine]: ranked by eval_loss" in said
    assert "[q_proj]" in said
    assert "[q_proj,v_proj]" in said


@pytest.mark.parametrize(
    ("code", "wanted", "undone", "exit_code"),
    [
        (0, {"export": ExportConfig(merge=True)}, "", 0),
        (1, {"export": ExportConfig(merge=True)}, "not merged", 1),
        (1, {"checkpoint": CheckpointConfig(remote="/copies")}, "its copy is not complete", 1),
        (1, {}, "", 0),
    ],
    ids=["merged", "not merged", "not copied", "nothing asked"],
)
def test_a_run_that_is_completed_and_not_copied_or_merged_as_was_asked_is_told_of(
    tmp_path, capsys, code, wanted, undone, exit_code
):
    job = Job(overrides=[], run_dir=tmp_path / "r=4", config=TrainConfig(lora=LoraConfig(), **wanted))
    job.run_dir.mkdir()
    rundir.write_result(job.run_dir, status="completed", objective=0.5)
    JobRecord(launcher="packed", job_id="1", state=ENDED, exit_code=code).write(job.run_dir)
    sweep = Sweep(directory=tmp_path, objective="eval_loss", jobs_of_this_command=[job], earlier=[])

    sweep.collect(job)

    assert job.undone.startswith(undone)
    assert bool(job.undone) == bool(undone)
    assert job.undone in capsys.readouterr().out
    assert sweep.exit_code() == exit_code
    sweep.jobs_of_this_command.append(
        Job(overrides=[], run_dir=tmp_path / "r=8", config=TrainConfig(), status="preempted")
    )
    assert sweep.exit_code() == 75  # the same command goes on


def test_only_copies_of_runs_that_are_over_here_and_not_at_work_are_completed(tmp_path):
    jobs = []
    for name, status in (("over", "completed"), ("sending", "completed"), ("elsewhere", "preempted")):
        config = TrainConfig(checkpoint=CheckpointConfig(remote=str(tmp_path / "copies")), run_dir=str(tmp_path / name))
        jobs.append(Job(overrides=[], run_dir=tmp_path / name, config=config, is_over=True, status="completed"))
        jobs[-1].run_dir.mkdir()
        save(config, jobs[-1].run_dir)
        rundir.write_result(jobs[-1].run_dir, status=status)
    sweep = Sweep(directory=tmp_path, objective="eval_loss", jobs_of_this_command=jobs, earlier=[])

    sweep.complete_copies(is_at_work=lambda run_dir: run_dir.name == "sending")

    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["over"]
    assert rundir.read_result(tmp_path / "copies/over") == rundir.read_result(tmp_path / "over")


def test_a_run_whose_process_left_nothing_names_the_log_of_that_process(tmp_path):
    job = Job(overrides=[], run_dir=tmp_path / "r=4", config=TrainConfig())
    sweep = Sweep(directory=tmp_path, objective="eval_loss", jobs_of_this_command=[job], earlier=[])

    sweep.collect(job, log=tmp_path / "pack.log")

    assert (job.status, job.error) == ("failed", f"its process ended without a result; see {tmp_path / 'pack.log'}")
