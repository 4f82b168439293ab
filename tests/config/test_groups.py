"""`conf/`: every option composes, resolves and passes the checks, and every file explains itself to its reader."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import llmkit
from llmkit.config.nodes import GROUPS
from llmkit.config.registration import group_names, group_options
from llmkit.config.schema import METHODS

CONF = Path(llmkit.__file__).parent / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
EXPERIMENTS = group_options("experiment")
RUNS_GROUPS = [group for group in ("recipe", *GROUPS) if group != "sweeper"]  # which makes several configs
OPTIONS = [(group, option) for group in RUNS_GROUPS for option in group_options(group)]

# What an option cannot do without.
NEEDED = {
    ("model", "custom"): ["model.hub_id=org/name"],
    ("data", "jsonl"): ["data.path=rows.jsonl"],
    ("experiment", "mistral_qlora"): ["data.path=rows.jsonl"],
}


@pytest.fixture
def with_rows(tmp_path, monkeypatch):
    """A working directory that holds rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')


@pytest.mark.usefixtures("with_rows")
@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_of_every_group_composes_and_is_valid(compose, group, option):
    config = compose(f"{group}={option}", *NEEDED.get((group, option), []))

    chosen = getattr(config, group)
    assert option in (chosen, getattr(chosen, "name", option))


@pytest.mark.usefixtures("with_rows")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_is_valid(compose, experiment):
    compose(f"experiment={experiment}", *NEEDED.get(("experiment", experiment), []))


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_and_precisions_are_independent(compose, method, precision):
    config = compose(f"method={method}", f"precision={precision}")

    assert (config.method.name, config.precision.name) == (method, precision)


def test_what_an_experiment_chooses_wins_over_the_defaults_and_loses_to_the_command_line(compose):
    assert compose("experiment=demo_full").method.name == "full"
    assert compose("experiment=demo_full", "method=freeze").method.name == "freeze"
    assert compose("experiment=demo_full").training.max_steps == 100
    assert compose("experiment=demo_full", "training.max_steps=7").training.max_steps == 7


def test_every_group_of_the_schema_has_a_folder_and_every_folder_a_group():
    folders = {path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "__pycache__")}

    assert folders == set(group_names())


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_opens_with_a_comment_that_says_what_it_is(file):
    lines = (CONF / file).read_text(encoding="utf-8").splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    said = [line for line in head if not line.startswith("# @package")]

    assert said, f"{file}: no head comment"
    assert len(said[0]) > len("# ..."), f"{file}: an empty head comment"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_opens_with_its_command(experiment):
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))

    assert any(line.startswith(f"#   llmkit train experiment={experiment}") for line in head)


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "method"])
def test_an_option_is_named_like_its_file_so_that_a_written_config_finds_it_again(group):
    for option in group_options(group):
        content = OmegaConf.load(CONF / group / f"{option}.yaml")
        node = content.get(group, content)  # a file for the whole config has its own node inside
        if "name" in {field.name for field in dataclasses.fields(GROUPS[group])}:
            assert node.name == option


def test_consumer_cards_switch_off_what_they_lack(compose):
    for card in ("rtx3090", "rtx4090"):
        assert compose(f"hardware={card}").hardware.env == {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
