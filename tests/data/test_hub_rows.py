"""Rows of the hub: downloaded at one commit, then there without it, and refused in one message that says what to do."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

CHECKOUT = Path(__file__).parents[2]
# For each case of argv one line: the commit, the fingerprint and the rows, or what was said. The hub's client waits
# between its tries: not here.
READ = """
import json, os, sys, time
time.sleep = lambda seconds: None
from llmkit.config.schema import SourceConfig
from llmkit.data.reading.sources import open_source
from llmkit.errors import ConfigError

for settings, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    config = SourceConfig(**settings)
    try:
        source = open_source(config)
        rows = [(row.number, row.values) for block in source.blocks() for row in block.rows()]
        print(json.dumps({"commit": config.commit, "fingerprint": source.fingerprint(), "rows": rows}))
    except ConfigError as error:
        print(json.dumps(str(error)))
"""
OTHER_COMMIT = "f" * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    for name in ("rows", "configs"):
        (root / name).mkdir()
    for split, count in (("train", 2500), ("test", 3)):
        lines = "".join(
            json.dumps({"n": n, "messages": [{"role": "user", "content": split}]}) + "\n" for n in range(count)
        )
        (root / "rows" / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("main", "other"):
        (root / "configs" / f"{name}.csv").write_text(f"name\n{name}\n")
    (root / "configs" / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files: main.csv\n"
        "- config_name: other\n  data_files: other.csv\n---\n"
    )
    repositories = {f"datasets/org/{name}": root / name for name in ("rows", "configs")}
    with FakeHub(repositories | {"datasets/org/gated": root / "rows"}, gated={"datasets/org/gated"}) as hub:
        yield hub


def read(*cases, env):
    """Read sources in a process of its own, since it reads HF_ENDPOINT on import."""
    code = [sys.executable, "-c", READ, json.dumps([(case, "") if isinstance(case, dict) else case for case in cases])]
    done = subprocess.run(code, env=os.environ | env, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if "requesting" not in line and "Retrying" not in line]
    assert noise == [], "the worker silences the hub's client; nothing else speaks"
    return [json.loads(line) for line in done.stdout.splitlines()]


CASES = {
    "train": {"hub_id": "org/rows"},
    "test": {"hub_id": "org/rows", "split": "test"},
    "expression": {"hub_id": "org/rows", "split": "train[:2]+test[:1]"},
    "limit": {"hub_id": "org/rows", "limit": 1001},
    "commit": {"hub_id": "org/rows", "revision": "gone", "commit": COMMIT},
    "revision is a commit": {"hub_id": "org/rows", "revision": COMMIT},
    "config": {"hub_id": "org/configs", "hub_config": "other"},
    "gated, with a token": ({"hub_id": "org/gated", "limit": 1}, "hf_anything"),
    "gated": {"hub_id": "org/gated"},
    "not there": {"hub_id": "org/none"},
    "no revision": {"hub_id": "org/rows", "revision": "v9"},
    "no commit": {"hub_id": "org/rows", "commit": OTHER_COMMIT},
    "no split": {"hub_id": "org/rows", "split": "tset"},
    "no config": {"hub_id": "org/configs", "hub_config": "mian"},
    "config not chosen": {"hub_id": "org/configs"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answers(hub, home):
    """Case -> what reading it gave."""
    return dict(zip(CASES, read(*CASES.values(), env=hub.environment(home)), strict=True))


def test_a_split_is_read_in_order_and_its_commit_is_kept(answers):
    answer = answers["train"]

    assert answer["commit"] == COMMIT
    assert [number for number, _ in answer["rows"]] == list(range(2500))
    assert [row["n"] for _, row in answer["rows"]] == list(range(2500))
    assert answer["rows"][0][1]["messages"] == [{"role": "user", "content": "train"}]


def test_another_split_and_parts_of_splits_are_read(answers):
    assert [row["n"] for _, row in answers["test"]["rows"]] == [0, 1, 2]
    texts = [(row["n"], row["messages"][0]["content"]) for _, row in answers["expression"]["rows"]]
    assert texts == [(0, "train"), (1, "train"), (0, "test")]


def test_a_limit_gives_the_first_rows_of_the_hub(answers):
    assert answers["limit"]["rows"] == answers["train"]["rows"][:1001]


@pytest.mark.parametrize("case", ["commit", "revision is a commit"])
def test_a_commit_reads_the_same_rows_again(answers, case):
    assert answers[case] == answers["train"]


def test_a_config_of_a_data_set_is_read(answers):
    assert [row for _, row in answers["config"]["rows"]] == [{"name": "other"}]


def test_the_fingerprint_names_the_rows(answers):
    cases = ["train", "test", "expression", "config"]

    assert len({answers[case]["fingerprint"] for case in cases}) == len(cases)


def test_a_gated_data_set_is_read_with_a_token(answers):
    assert len(answers["gated, with a token"]["rows"]) == 1


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("gated", "data.hub_id=org/gated: is gated; accept its licence"),
        ("not there", "data.hub_id=org/none: no such data set on the hub, or a private one (then set HF_TOKEN)"),
        ("no revision", "data.hub_id=org/rows: has no revision 'v9'"),
        ("no commit", f"data.hub_id=org/rows: has no revision '{OTHER_COMMIT}'"),
        ("no split", "data.hub_id=org/rows: has no split 'tset', but train, test. Did you mean 'test'?"),
        ("no config", "'mian' not found. Available: ['main', 'other']. Choose one with hub_config."),
        ("config not chosen", "['main', 'other']. Choose one with hub_config."),
    ],
)
def test_what_the_hub_lacks_is_said(answers, case, said):
    assert said in answers[case]


def test_what_was_read_once_is_there_without_the_hub(hub, home, answers):
    hub.requests.clear()
    cases = ["train", "test", "commit", "revision is a commit"]
    offline = read(*(CASES[case] for case in cases), env=hub.environment(home) | {"HF_HUB_OFFLINE": "1"})

    assert offline == [answers[case] for case in cases]
    assert hub.requests == []


def test_without_the_hub_no_other_commit_is_passed_off_as_the_one_asked_for(hub, home, answers):
    wrong = [{"hub_id": "org/rows", "commit": OTHER_COMMIT}, {"hub_id": "org/rows", "revision": "v1"}]
    messages = read(*wrong, env=hub.environment(home) | {"HF_HUB_OFFLINE": "1"})

    assert f"the cache holds commit {COMMIT}, not {OTHER_COMMIT}" in messages[0]
    assert "data.hub_id=org/rows cannot be loaded: " in messages[1]


def test_a_directory_of_that_name_is_not_read_instead(hub, home, answers, tmp_path):
    (tmp_path / "org" / "rows").mkdir(parents=True)
    (tmp_path / "org" / "rows" / "train.jsonl").write_text('{"n": "local"}\n')
    code = f"import os; os.chdir({str(tmp_path)!r})\n{READ}"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([(CASES["test"], "")])],
        env=os.environ | hub.environment(home) | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout) == answers["test"]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_out_of_reach_says_what_to_do(tmp_path, offline):
    # Nothing listens at that port.
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    (message,) = read({"hub_id": "org/nothing"}, env=env)

    assert message.startswith("data.hub_id=org/nothing cannot be loaded: ")
    for words in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "data.path=DIR"):
        assert words in message
