"""The README is true: its commands run, its tables list what there is."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from ports import free_port

from llmkit.config.registration import group_names, group_options

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line]
# What makes a command of the README short: its meaning stays.
SHORT = ("training.max_steps=2", "evaluation=off")
SMALL = ("serve=cpu",)
HUB_MODELS = {"qwen3_0_6b": "Qwen/Qwen3-0.6B", "mistral7b": "mistralai/Mistral-7B-v0.1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_model_dir):
    """A directory with the files the README speaks of, and a cache that holds the tiny model under the hub's names."""
    directory = tmp_path_factory.mktemp("readme")
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}] for n in range(40)]
    (directory / "chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    pairs = [{"prompt": f"{n}?", "chosen": str(n), "rejected": "no"} for n in range(40)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (directory / "my.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    script = 'def rows():\n    for n in range(40):\n        yield {"question": f"{n}?", "answer": str(n)}\n'
    (directory / "my_script.py").write_text(script)
    for hub_id in HUB_MODELS.values():
        repository = directory / "huggingface/hub" / f"models--{hub_id.replace('/', '--')}"
        shutil.copytree(tiny_model_dir, repository / "snapshots" / ("1" * 40))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("1" * 40)
    yield directory
    subprocess.run([sys.executable, "-m", "llmkit", "serve", "stop=true"], cwd=directory, check=True)


@pytest.fixture(scope="module")
def bucket(s3_server):
    """The bucket that the README calls `bucket`."""
    s3_server.client().create_bucket(Bucket="bucket")
    return s3_server.environment


@pytest.fixture(scope="module")
def hub(tiny_model_dir, tmp_path_factory):
    """What leads to a hub that has the tiny model under the hub's names."""
    with FakeHub(dict.fromkeys(HUB_MODELS.values(), tiny_model_dir)) as hub:
        yield hub.environment(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make")])
def test_a_command_of_the_readme_runs(command, workplace, bucket, hub, monkeypatch):
    words = shlex.split(command)
    started = [sys.executable, "-m", "llmkit"] if words[0] == "llmkit" else [sys.executable, *words[1:3]]
    arguments = words[1:] if words[0] == "llmkit" else words[3:]
    verb = arguments[0] if words[0] == "llmkit" else words[2].rpartition(".")[2]
    if "train" in command and not {"--help", "--cfg"} & set(arguments):
        arguments += SHORT
    if verb == "serve" and "stop=true" not in arguments:
        pytest.importorskip("vllm", reason="serving needs vLLM: make serve-env")
        arguments += [*SMALL, f"serve.port={free_port()}"]
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("HF_HOME", str(workplace / "huggingface"))
    for name, value in (bucket | (hub if "fetch model" in command else {})).items():
        monkeypatch.setenv(name, value)

    done = subprocess.run([*started, *arguments], cwd=workplace, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


ELSEWHERE = re.findall(r"^\| [^|`]+ \| `llmkit train (.*?)`", README, re.M)


def test_the_table_from_one_cpu_to_a_cluster_is_found():
    assert len(ELSEWHERE) >= 9


@pytest.mark.parametrize("words", ELSEWHERE)
def test_a_command_for_machines_that_are_not_here_is_a_whole_config(words, workplace, compose, monkeypatch):
    monkeypatch.chdir(workplace)

    made = compose(*shlex.split(words))

    for config in made if isinstance(made, list) else [made]:
        assert config.model.hub_id
        assert config.training.global_batch_size


def test_the_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.M)

    named = set(re.findall(r"make ([a-z-]+)", README)) - {"s"}
    assert {"demo", "test", "pins", "bench", "serve-env"} <= named <= set(targets)


def test_the_table_of_groups_lists_every_option():
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| (.*) \|$", README, re.M))

    for group in group_names():
        assert set(group_options(group)) == set(re.findall(r"`(\w+)`", rows[group])), group


def test_the_file_tree_names_what_is_there():
    tree = re.search(r"```text\n(.*?)```", README, re.S)[1]
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        assert (CHECKOUT / ("llmkit/" if indent else "") / name).exists(), name
