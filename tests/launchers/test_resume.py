"""`llmkit resume`, and what ends a run that was started from a terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
LONG = ("training.max_steps=100000", "evaluation=off", "training.logging_steps=1", "training.eval_steps=1000000")


def start(folder: Path, *arguments: str, **popen) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llmkit.train", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | popen,
    )


def wait_for_steps(run_dir: Path, count: int) -> None:
    deadline, metrics = time.monotonic() + 120, run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"loss"') < count:
        assert time.monotonic() < deadline, "no training step was seen"
        time.sleep(0.1)


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def test_resume_goes_on_with_the_newest_unfinished_run_and_knows_a_finished_one(tmp_path, run_llmkit):
    driver = start(tmp_path, "name=long", *LONG)
    wait_for_steps(tmp_path / "runs/long", 3)
    driver.send_signal(signal.SIGUSR1)
    output = driver.communicate(timeout=60)[0]
    assert driver.returncode == 75, output
    stopped = result_of(tmp_path / "runs/long")["steps"]
    assert f"by SIGUSR1 at step {stopped}, saved" in output
    more = [f"training.max_steps={stopped + 2}", "resume_allow=[training.max_steps]"]

    went_on = run_llmkit("resume", *more, cwd=tmp_path)
    finished = run_llmkit("resume", "runs/long", cwd=tmp_path)
    none = run_llmkit("resume", cwd=tmp_path)

    assert went_on.returncode == 0, went_on.stderr
    assert "runs/long: the newest unfinished run" in went_on.stdout
    assert f"goes on from step {stopped} (its newest checkpoint)" in went_on.stdout
    assert result_of(tmp_path / "runs/long")["steps"] == stopped + 2
    assert finished.returncode == 0
    assert "holds this run, finished" in finished.stdout
    assert none.returncode == 2
    assert "holds no unfinished run" in none.stderr


@pytest.mark.parametrize("word", ["runs/none", "runs"])
def test_resume_of_what_is_no_run_says_so(tmp_path, run_llmkit, word):
    (tmp_path / "runs").mkdir()

    answer = run_llmkit("resume", word, cwd=tmp_path)

    assert answer.returncode == 2
    assert "is not a run directory" in answer.stderr


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    driver = start(tmp_path, "name=long", *LONG)
    wait_for_steps(tmp_path / "runs/long", 2)

    driver.send_signal(signal.SIGINT)
    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=20)[0]

    assert driver.returncode == 75, output
    assert result_of(tmp_path / "runs/long")["status"] in ("stopped", "preempted")


def test_a_run_outlives_its_terminal_and_keeps_what_it_says(tmp_path):
    ours, theirs = pty.openpty()
    command = ("name=long", "training.max_steps=25", "evaluation=off", "training.logging_steps=1")
    driver = start(tmp_path, *command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    run_dir = tmp_path / "runs/long"
    reading = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < reading:
        os.read(ours, 4096)

    os.close(ours)
    driver.send_signal(signal.SIGHUP)
    driver.wait(timeout=120)

    assert driver.returncode == 0
    assert result_of(run_dir)["status"] == "completed"
    assert "final" in (run_dir / "console.log").read_text()
