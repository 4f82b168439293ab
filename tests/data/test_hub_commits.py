"""The commits of hub data, of the held-out rows too: found once, kept in the config, and read again by who goes on."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from llmkit.config import adopt_findings, differences

# For each data config of argv a line: what its commits, data.validation and data.test are after preparing it. A process
# reads HF_ENDPOINT on import.
PREPARE = """
import json, sys
from llmkit.config.schema import DataConfig, ModelConfig
from llmkit.data.prepare import prepare_data
from llmkit.model.tokenizer import load_tokenizer

tokenizer = load_tokenizer(ModelConfig(name="tiny", path=sys.argv[1]), "keep-original")
for settings in json.loads(sys.argv[2]):
    data = DataConfig(**settings)
    prepare_data(data, tokenizer, max_length=256)
    print(json.dumps([data.commit, data.validation, data.test]))
"""
OTHER = {"hub_id": "org/other"}
CASES = {
    "a data set of its own": {"path": "demo", "validation": OTHER},
    "both": {"path": "demo", "validation": OTHER, "test": {"hub_id": "org/rows", "split": "test"}},
    "a revision of its own": {"hub_id": "org/rows", "validation": None, "test": {"revision": "main", "split": "test"}},
    "a split's name": {"hub_id": "org/rows", "validation": "test"},
    "a split in a mapping": {"hub_id": "org/rows", "validation": {"split": "test"}},
    "a file": {"path": "demo", "validation": {"path": "demo", "split": "validation"}},
}


@pytest.fixture(scope="module")
def found(tiny_model_dir, tmp_path_factory):
    """Case -> (data.commit, data.validation, data.test) once it is prepared."""
    root = tmp_path_factory.mktemp("repositories")
    for name in ("rows", "other"):
        (root / name).mkdir()
        for split in ("train", "test"):
            rows = [{"question": f"{name} {split} {n}?", "answer": str(n)} for n in range(3)]
            (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = [sys.executable, "-c", PREPARE, str(tiny_model_dir), json.dumps(list(CASES.values()))]
    with FakeHub({f"datasets/org/{name}": root / name for name in ("rows", "other")}) as hub:
        env = os.environ | hub.environment(tmp_path_factory.mktemp("home"))
        done = subprocess.run(code, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_held_out_data_set_of_its_own_keeps_its_commit(found):
    assert found["a data set of its own"] == [None, OTHER | {"commit": COMMIT}, None]
    assert found["both"][2] == {"hub_id": "org/rows", "split": "test", "commit": COMMIT}


def test_held_out_rows_at_a_revision_of_their_own_keep_their_commit(found):
    assert found["a revision of its own"] == [COMMIT, None, {"revision": "main", "split": "test", "commit": COMMIT}]


@pytest.mark.parametrize(("case", "value"), [("a split's name", "test"), ("a split in a mapping", {"split": "test"})])
def test_held_out_rows_of_the_trainings_data_set_have_its_commit(found, case, value):
    assert found[case] == [COMMIT, value, None]


def test_files_have_no_commit(found):
    assert found["a file"] == [None, CASES["a file"]["validation"], None]


@pytest.fixture
def run_and_command(compose):
    """The config of a run that found a commit for data.test, and that of its command, given again."""
    command = compose("data.test={hub_id: org/rows, split: test}")
    run = copy.deepcopy(command)
    run.data.test["commit"] = COMMIT
    return run, command


def test_the_command_of_a_run_leaves_the_commit_to_be_found_and_goes_on_with_the_one_that_was(run_and_command):
    run, command = run_and_command
    assert differences(run, command) == []

    adopt_findings(command, run)

    assert command.data.test == run.data.test


def test_another_commit_or_revision_is_another_config(run_and_command, compose):
    run, _ = run_and_command
    for other in ("commit: " + "f" * 40, "revision: v2"):
        (line,) = differences(run, compose(f"data.test={{hub_id: org/rows, split: test, {other}}}"))
        assert line.startswith("data.test: ")
