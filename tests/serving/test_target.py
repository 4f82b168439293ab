"""Which model a command means."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llmkit.config.schema import ModelConfig, TrainConfig
from llmkit.errors import ConfigError
from llmkit.serving.target import best_of_sweep, find_target, newest_finished, of_model, of_run, ranked_runs


@pytest.fixture
def runs(tuned_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run as `runs/tuned`, in a directory of the test's own."""
    shutil.copytree(tuned_run, tmp_path / "runs" / "tuned")
    return tmp_path / "runs"


def status(run_dir: Path, **changed) -> None:
    path = run_dir / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_run_is_its_adapter_on_its_base_and_answers_under_its_name(runs):
    target = of_run(runs / "tuned")

    assert (target.name, target.source, target.home) == ("tuned", str(runs / "tuned" / "final"), runs / "tuned")
    assert target.adapter["r"] == 4
    assert target.base == target.run.model
    assert not target.is_whole


def test_final_itself_means_its_run(runs):
    run, final = of_run(runs / "tuned"), of_run(runs / "tuned" / "final")

    assert (final.name, final.source, final.home) == (run.name, run.source, run.home)


def test_a_checkpoint_is_a_target_of_its_own_with_the_runs_home(runs):
    target = of_run(runs / "tuned" / "checkpoints" / "step-00000010")

    assert target.name == "tuned-step-00000010"
    assert Path(target.source).name == "step-00000010"
    assert target.home == runs / "tuned"


def test_what_is_no_whole_checkpoint_is_refused(runs):
    checkpoint = runs / "tuned" / "checkpoints" / "step-00000010"
    (checkpoint / "MANIFEST.json").unlink()

    with pytest.raises(ConfigError, match=r"not a checkpoint, or not a whole one"):
        of_run(checkpoint)


def test_an_unfinished_run_says_how_to_finish_it(runs):
    status(runs / "tuned", status="preempted")

    with pytest.raises(ConfigError, match=r"not finished \(its status: preempted\); llmkit resume"):
        of_run(runs / "tuned")


def test_a_directory_that_is_not_there_has_its_nearest_name(runs):
    with pytest.raises(ConfigError, match=r"no such directory.* Did you mean 'tuned'"):
        of_run(runs / "tuend")


def test_the_newest_finished_run_is_found_among_runs_and_the_jobs_of_sweeps(runs):
    job = runs / "ranks" / "r=4"
    shutil.copytree(runs / "tuned", job)
    os.utime(job / "result.json", ns=(2**62, 2**62))

    assert newest_finished(runs) == job
    status(job, status="failed")
    assert newest_finished(runs) == runs / "tuned"


def test_without_a_finished_run_it_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"no finished run under .*: llmkit train makes one"):
        newest_finished(tmp_path)


def sweep(directory: Path, objective: str, **jobs: float | None) -> Path:
    records = []
    for name, value in jobs.items():
        (directory / name).mkdir(parents=True)
        done = "completed" if value is not None else "failed"
        records.append({"run_dir": f"elsewhere/{name}", "status": done, "objective": value, "overrides": []})
    (directory / "sweep.json").write_text(json.dumps({"objective": objective, "jobs": records}))
    return directory


def test_the_best_run_of_a_sweep_has_the_least_loss_or_the_most_exact_matches(tmp_path):
    losses = sweep(tmp_path / "losses", "eval_loss", a=2.0, b=1.0, c=None)
    matches = sweep(tmp_path / "matches", "exact_match", a=0.9, b=0.1)

    assert best_of_sweep(losses) == losses / "b"
    assert [run.name for run in ranked_runs(matches)] == ["a", "b"]


def test_a_sweep_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="none of its 1 runs is finished"):
        best_of_sweep(sweep(tmp_path / "failed", "eval_loss", a=None))


def test_a_run_named_as_a_sweep_says_how_to_name_it(runs):
    with pytest.raises(ConfigError, match=f"run={runs / 'tuned'}"):
        best_of_sweep(runs / "tuned")


def test_the_probe_of_a_run_in_a_bucket_comes_along(runs, s3_url):
    from llmkit.serving.parity import read_probe
    from llmkit.storage import open_place, upload_files

    there = open_place(f"{s3_url}/tuned", of_run(runs / "tuned").run.storage)
    files = [path for path in (runs / "tuned").rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    upload_files(there, runs / "tuned", [path.relative_to(runs / "tuned").as_posix() for path in files])
    target = of_run(there.url)

    assert (target.name, target.home) == ("tuned", Path("runs/served/tuned"))
    assert read_probe(target) == read_probe(of_run(runs / "tuned"))


def test_a_directory_with_a_model_is_that_model(tiny_model_dir):
    target = find_target({}, TrainConfig(model=ModelConfig(path=str(tiny_model_dir))))

    assert target.is_whole
    assert target.source == str(tiny_model_dir)
    assert target.name == tiny_model_dir.name


def test_an_adapter_given_as_a_model_says_how_to_name_it(runs):
    with pytest.raises(ConfigError, match="an adapter; run="):
        of_model(ModelConfig(path=str(runs / "tuned" / "final")))


def test_an_adapter_that_llmkit_did_not_make_has_the_base_it_names(runs, tmp_path):
    foreign = shutil.copytree(runs / "tuned" / "final", tmp_path / "foreign")
    settings = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/base"}))
    target = of_run(foreign)

    assert (target.base.hub_id, target.run, target.name) == ("org/base", None, "foreign")
