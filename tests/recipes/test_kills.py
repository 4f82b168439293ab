"""A killed run goes on as if nothing had happened: the short version of `make chaos`, a few kills of each case."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
KILLS, BOUNDARIES, DAMAGES = 3, 1, 1  # of each case
CASES = 9
SECONDS = 800.0  # that all may take; two minutes on two idle cores


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What chaos writes. A process of its own: it forks, which one with threads must not do."""
    file = tmp_path_factory.mktemp("chaos") / "score.json"
    words = {"--kills": KILLS * CASES, "--boundaries": BOUNDARIES, "--damages": DAMAGES, "--seed": 1, "--json": file}
    log = file.with_name("log.txt")
    with log.open("w") as output:
        done = subprocess.Popen(
            [sys.executable, CHECKOUT / "tests" / "chaos", *(str(word) for pair in words.items() for word in pair)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])},
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            done.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)  # its forks too
    assert file.exists(), log.read_text()
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_case_was_killed_at_random_and_at_file_boundaries_and_had_a_checkpoint_damaged(score):
    assert len(score["cases"]) == CASES
    for case, counts in score["cases"].items():
        tried = counts["kills"], counts["boundary_kills"], counts["damages"]
        assert tried == (KILLS, BOUNDARIES, DAMAGES), case


def test_every_run_ended_as_the_one_that_nobody_disturbed(score):
    assert score["failures"] == []
