"""`llmkit jobs`: from another shell than the one that started them, runs of every launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, free_ports, wait_until

from llmkit import rundir
from llmkit.config import save
from llmkit.launchers.job_record import JobRecord
from llmkit.launchers.overview import Overview

CHECKOUT = Path(__file__).parents[1]
FAST = ("training.max_steps=4", "evaluation=off", "training.logging_steps=1")
LONG = ("training.max_steps=100000", "evaluation=off", "training.logging_steps=1", "training.eval_steps=1000000")
SLURM = ("launcher=slurm", "launcher.poll_s=1", "launcher.cpus_per_task=1", "launcher.preflight=false")
QUEUE = (*SLURM, "launcher.wait=false")


def result_of(run_dir: Path) -> dict | None:
    path = run_dir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def wait_for_steps(run_dir: Path, count: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= count, "no step was seen", 180)


def wait_for_result(run_dir: Path) -> None:
    wait_until(lambda: result_of(run_dir) is not None, f"{run_dir} leaves no result", 180)


def row_of(output: str, run: str) -> str:
    (row,) = (line for line in output.splitlines() if line.startswith(f"{run} "))
    return row


@pytest.fixture
def here(tmp_path):
    """A function that starts a run on this machine and leaves it alone; what is left is ended with the test."""
    drivers = []

    def start(*words: str) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
        command = [sys.executable, "-m", "llmkit", "train", *words]
        drivers.append(
            subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.wait()


def test_runs_of_this_machine_are_listed_and_cancelled(run_llmkit, tmp_path, here):
    assert run_llmkit("train", "name=done", *FAST).returncode == 0
    driver = here("name=long", *LONG)
    wait_for_steps(tmp_path / "runs/long", 2)

    listed = run_llmkit("jobs")
    cancelled = run_llmkit("jobs", "cancel", "long")
    driver.wait(timeout=60)

    assert listed.returncode == cancelled.returncode == 0, listed.stderr + cancelled.stderr
    running = row_of(listed.stdout, "runs/long")
    assert re.search(r"local +\d+ +running +\d+/100,000 +\d\.\d{4}", running), running
    assert re.search(r"\d:\d\d:\d\d", running), "its ETA"
    assert re.search(r"completed +4/4", row_of(listed.stdout, "runs/done"))
    assert listed.stdout.index("runs/long") < listed.stdout.index("runs/done")  # what is under way comes first
    assert driver.returncode == 75
    assert "preempted" in row_of(run_llmkit("jobs", "list", "runs/long").stdout, "runs/long")
    assert "nothing is queued or running" in run_llmkit("jobs", "cancel", "long").stdout


def test_a_sweep_of_this_machine_is_cancelled_as_a_whole_and_collected(run_llmkit, tmp_path, here):
    driver = here("name=s", "-m", "lora.r=2,4", *LONG)
    wait_for_steps(tmp_path / "runs/s/r=2", 1)

    busy = run_llmkit("jobs", "collect", "s")
    assert run_llmkit("jobs", "cancel", "s").returncode == 0
    assert driver.wait(timeout=60) == 75
    collected = run_llmkit("jobs", "collect", "s")

    assert busy.returncode == 2
    assert f"in use by process {driver.pid}" in busy.stderr
    assert collected.returncode == 75
    jobs = json.loads((tmp_path / "runs/s/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["preempted", "waiting"]
    assert "1 waiting, 1 preempted" in (tmp_path / "runs/s/report.html").read_text()


def test_a_sweep_on_slurm_is_collected_and_ranked_by_another_process(slurm: SlurmCluster, run_llmkit, tmp_path):
    queued = run_llmkit("train", *QUEUE, "-m", "lora.r=2,4", "name=s", *FAST, env=slurm.environment)
    assert queued.returncode == 0, queued.stderr
    early = run_llmkit("jobs", "collect", "s", env=slurm.environment)
    for name in ("r=2", "r=4"):
        wait_for_result(tmp_path / "runs/s" / name)
    wait_until(lambda: not slurm.states(), slurm.told, 60)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    late = run_llmkit("jobs", "collect", tmp_path / "runs/s", cwd=elsewhere, env=slurm.environment)

    assert early.returncode == 0, early.stderr
    assert late.returncode == 0, late.stdout + late.stderr
    jobs = json.loads((tmp_path / "runs/s/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["completed"] * 2
    results = [result_of(tmp_path / "runs/s" / name) for name in ("r=2", "r=4")]
    assert [job["objective"] for job in jobs] == [result["objective"] for result in results]
    assert [job["run_dir"] for job in jobs] == ["runs/s/r=2", "runs/s/r=4"]  # as whoever started it sees them
    assert "│ 1 │ 4 " in late.stdout
    assert (tmp_path / "runs/s/sweep.png").exists()


def test_jobs_of_slurm_are_listed_followed_and_cancelled(slurm: SlurmCluster, run_llmkit, tmp_path):
    env = slurm.environment
    first = run_llmkit("train", *QUEUE, *LONG, "name=first", "launcher.nodelist=node1", env=env)
    wide = ("launcher.cpus_per_task=4", "launcher.nodelist=node1")  # all of that node, once it is free
    second = run_llmkit("train", *QUEUE, *LONG, *wide, "name=second", env=env)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    wait_for_steps(tmp_path / "runs/first", 2)

    listed = run_llmkit("jobs", env=env)
    following = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "jobs", "logs", "first", "-f"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)} | env,
        stdout=subprocess.PIPE,
        text=True,
    )
    silent = run_llmkit("jobs", "logs", "second", env=env)
    for name in ("second", "first"):
        assert run_llmkit("jobs", "cancel", name, env=env).returncode == 0
    said = following.communicate(timeout=120)[0]

    assert re.search(r"slurm +\d+ +running +\d+/100,000 .* node1", row_of(listed.stdout, "runs/first"))
    assert re.search(r"slurm +\d+ +queued .*Resources|Priority", row_of(listed.stdout, "runs/second"))
    assert "runs/second has said nothing yet (queued)" in silent.stderr
    assert following.returncode == 0
    assert "step 1/100000" in said
    assert "stopped    by SIGTERM" in said  # it was followed to its end
    wait_until(lambda: not slurm.states(), slurm.told, 60)
    ended = run_llmkit("jobs", env=env).stdout
    assert "preempted" in row_of(ended, "runs/first")
    assert "stopped" in row_of(ended, "runs/second")


def test_what_is_queued_on_slurm_is_not_run_on_this_machine_too(slurm: SlurmCluster, run_llmkit, tmp_path):
    assert run_llmkit("train", *QUEUE, *LONG, "name=a", env=slurm.environment).returncode == 0
    wait_for_steps(tmp_path / "runs/a", 1)

    here = run_llmkit("train", *LONG, "name=a", env=slurm.environment)
    cancelled = run_llmkit("jobs", "cancel", "a", env=slurm.environment)

    assert cancelled.returncode == 0
    assert here.returncode == 2
    assert "runs/a is in the hands of slurm (job " in here.stderr
    wait_until(lambda: not slurm.states(), slurm.told, 60)


def test_without_a_word_from_the_scheduler_the_run_directories_are_believed(slurm: SlurmCluster, run_llmkit, tmp_path):
    assert run_llmkit("train", *QUEUE, *LONG, "name=a", env=slurm.environment).returncode == 0
    wait_for_steps(tmp_path / "runs/a", 1)

    listed = run_llmkit("jobs", env={"PATH": str(tmp_path)})
    run_llmkit("jobs", "cancel", "a", env=slurm.environment)

    assert listed.returncode == 0
    assert "there is no sbatch here" in listed.stderr
    assert "running" in row_of(listed.stdout, "runs/a")
    wait_until(lambda: not slurm.states(), slurm.told, 60)


def test_a_run_whose_slurm_is_gone_is_given_up_by_a_word_of_its_own(slurm: SlurmCluster, run_llmkit, tmp_path):
    env, away = slurm.environment, {"PATH": str(tmp_path)}
    later = "launcher.additional_parameters.begin=now+1hour"
    assert run_llmkit("train", *QUEUE, *FAST, later, "name=a", env=env).returncode == 0
    run_dir = tmp_path / "runs/a"
    way_out = "llmkit jobs cancel runs/a gone=true"

    refused = run_llmkit("train", *FAST, "name=a", env=away)
    failed = run_llmkit("jobs", "cancel", "runs/a", env=away)
    answered = run_llmkit("jobs", "cancel", "a", "gone=true", env=env)
    with rundir.lock(run_dir):
        alive = run_llmkit("jobs", "cancel", "a", "gone=true", env=away)
    given_up = run_llmkit("jobs", "cancel", "a", "gone=true", env=away)
    here = run_llmkit("train", *FAST, "name=a", env=away)
    slurm.ask("scancel", *slurm.states())

    assert refused.returncode == 2
    assert "which cannot be asked: launcher=slurm: there is no sbatch here" in refused.stderr
    assert way_out in refused.stderr
    assert failed.returncode == 1
    assert way_out in failed.stderr
    assert answered.returncode == 2
    assert "slurm answers when it is asked for runs/a" in answered.stderr
    assert alive.returncode == 2
    assert "its job is not gone" in alive.stderr
    assert given_up.returncode == 0, given_up.stderr
    assert here.returncode == 0, here.stderr
    assert result_of(run_dir)["status"] == "completed"


def test_a_scheduler_that_did_not_answer_is_asked_again_and_takes_nothing_from_what_others_say(
    slurm: SlurmCluster, run_llmkit, compose, tmp_path, monkeypatch, capsys
):
    later = "launcher.additional_parameters.begin=now+1hour"
    assert run_llmkit("train", *QUEUE, *FAST, later, "name=a", env=slurm.environment).returncode == 0
    on_slurm, on_ray = tmp_path / "runs/a", tmp_path / "runs/b"
    slurm.ask("scancel", json.loads((on_slurm / "job.json").read_text())["job_id"])
    (port,) = free_ports(1)
    on_ray.mkdir()
    save(compose("launcher=ray", f"launcher.address=127.0.0.1:{port}"), on_ray)
    JobRecord(launcher="ray", job_id=f"none@127.0.0.1:{port}").write(on_ray)
    overview, path = Overview(), os.environ["PATH"]
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])

    def states() -> list[str]:
        return [view.state for view in overview.look([on_slurm, on_ray])]

    monkeypatch.setenv("PATH", str(tmp_path))
    silent = [states(), states()]
    monkeypatch.setenv("PATH", path)
    told = states()

    assert silent == [["queued", "queued"]] * 2
    assert told == ["stopped", "queued"]
    said = capsys.readouterr().err
    assert [said.count(words) for words in ("there is no sbatch here", f"nothing answers at 127.0.0.1:{port}")] == [
        1,
        1,
    ]


def test_watching_ends_with_the_last_run(run_llmkit, tmp_path, here):
    driver = here("name=short", "training.max_steps=60", *LONG[1:])
    wait_for_steps(tmp_path / "runs/short", 1)

    watched = run_llmkit("jobs", "watch")

    driver.wait(timeout=60)
    assert watched.returncode == 0, watched.stderr
    assert "completed" in watched.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logs", "alpah"], "Did you mean 'alpha'?"),
        (["cancel"], "llmkit jobs cancel takes one run or sweep"),
        (["list", "-f"], "-f goes with llmkit jobs logs"),
        (["list", "gone=true"], "gone=true goes with llmkit jobs cancel"),
        (["--all"], "--all: unknown switch"),
        (["colect", "alpha"], "Did you mean 'collect'?"),
        (["collect", "alpha"], "alpha is no sweep"),
        (["logs", "alpha"], "its log went to the terminal"),
    ],
    ids=" ".join,
)
def test_wrong_words_are_explained(run_llmkit, tmp_path, words, message):
    run_dir = tmp_path / "runs/alpha"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("seed: 1\n")

    done = run_llmkit("jobs", *words)

    assert done.returncode == 2
    assert message in done.stderr


def test_where_there_are_no_runs_it_says_so(run_llmkit):
    done = run_llmkit("jobs")

    assert done.returncode == 0
    assert done.stdout == "There are no runs in runs.\n"
