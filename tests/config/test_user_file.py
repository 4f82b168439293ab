"""A user's own YAML file comes first, may hold anything the command line can say, and loses to it."""

from pathlib import Path

import pytest

from llmkit.config.arguments import parse_arguments
from llmkit.errors import ConfigError


@pytest.fixture
def my(tmp_path):
    """A function that writes my.yaml, in a directory that is not the working one."""

    def write(text: str, name: str = "my.yaml") -> Path:
        file = tmp_path / "else where" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize(
    "text",
    ["model: phi2", "model: {name: phi2}", "model:\n  name: phi2\n  pad_token: eos"],
    ids=["a name", "a mapping", "a mapping with values"],
)
def test_a_group_is_a_name_or_a_mapping(compose, my, text):
    config = compose(my(text))

    assert config.model.hub_id == "microsoft/phi-2"
    assert config.model.pad_token == ("eos" if "eos" in text else "auto")


@pytest.mark.parametrize("text", ["model: org/name", "model: {hub_id: org/name}"])
def test_a_hub_model_is_a_name_with_a_slash_or_its_hub_id(compose, my, text):
    config = compose(my(text))

    assert (config.model.name, config.model.hub_id) == ("custom", "org/name")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training: {learning_rate: 2e-5}", "training.learning_rate", 2e-5),
        ("training: {learning_rate: 0.5}", "training.learning_rate", 0.5),
        ("training: {max_steps: null}", "training.max_steps", None),
        ("training: {gradient_checkpointing: true}", "training.gradient_checkpointing", True),
        ("model: {pad_token: 'a=b, \"c\" ''d'' \\'}", "model.pad_token", "a=b, \"c\" 'd' \\"),
        ("tracking: {run_name: '\\${literal}'}", "tracking.run_name", "${literal}"),
        ("tracking: {run_name: 'seed ${seed}'}", "tracking.run_name", "seed 42"),
        ("tracking: {run_name: '${oc.env:EXPERIMENT_NAME}'}", "tracking.run_name", "from outside"),
        ("lora: {target_modules: [q_proj, v_proj]}", "lora.target_modules", ["q_proj", "v_proj"]),
        ("lora: {target_modules: all-linear}", "lora.target_modules", "all-linear"),
        ("method: freeze\nfreeze: {patterns: ['a,b', 'c=[d]{2}']}", "freeze.patterns", ["a,b", "c=[d]{2}"]),
        ("hardware: {env: {OMP_NUM_THREADS: '4', X: 'a=b,c'}}", "hardware.env", {"OMP_NUM_THREADS": "4", "X": "a=b,c"}),
        ("evaluation: off", "evaluation.samples", 0),
        ("launcher: {max_parallel: 3}", "launcher.max_parallel", 3),
        ("seed: 7", "seed", 7),
        ("name: 2026-01-01", "name", "2026-01-01"),
        ("qlora: null\nseed: 7", "qlora", None),
    ],
)
def test_a_value_reaches_the_config_as_it_stands_in_the_file(compose, my, monkeypatch, text, key, value):
    monkeypatch.setenv("EXPERIMENT_NAME", "from outside")
    found = compose(my(text))
    for name in key.split("."):
        found = getattr(found, name)

    assert found == value
    assert type(found) is type(value)


def test_overrides_win_over_the_file(compose, my):
    config = compose(my("lora: {r: 4}\nseed: 1"), "lora.r=16")

    assert (config.lora.r, config.seed) == (16, 1)


def test_a_later_file_wins_over_an_earlier_one(compose, my):
    config = compose(my("lora: {r: 4}\nseed: 1", "a.yaml"), my("seed: 2", "b.yml"))

    assert (config.lora.r, config.seed) == (4, 2)


def test_a_group_chosen_on_the_command_line_replaces_what_the_file_says_of_it(compose, my):
    config = compose(
        my("model: {hub_id: my/own, pad_token: eos}\nhardware: {env: {A: b}}"), "model=phi2", "hardware=cpu"
    )

    assert (config.model.hub_id, config.model.pad_token, config.hardware.env) == ("microsoft/phi-2", "auto", {})


def test_a_hub_model_on_the_command_line_replaces_that_of_the_file(compose, my):
    assert compose(my("model: my/own"), "model=org/name").model.hub_id == "org/name"


def test_a_method_on_the_command_line_leaves_out_what_belongs_to_the_method_of_the_file(compose, my):
    config = compose(my("method: lora\nlora: {r: 4}"), "method=full")

    assert (config.method.name, config.lora) == ("full", None)


def test_a_method_on_the_command_line_keeps_what_it_shares_with_the_method_of_the_file(compose, my):
    config = compose(my("method: lora\nlora: {r: 4}"), "method=qlora")

    assert (config.lora.r, config.qlora.bits) == (4, 4)


def test_a_file_can_be_swept(compose, my):
    jobs = compose(my("lora: {r: 4}"), "-m", "seed=1,2")

    assert [(job.lora.r, job.seed) for job in jobs] == [(4, 1), (4, 2)]


def test_a_data_path_in_a_file_alone_takes_the_place_of_the_demo(compose, my, chats_file):
    assert compose(my(f"data: {{path: {chats_file()}}}")).data.name == "jsonl"


def test_an_experiment_can_be_chosen_in_a_file(compose, my):
    assert compose(my("experiment: demo_full")).method.name == "full"


def test_a_file_in_a_directory_of_a_sweep_is_no_override(compose, my):
    file = my("seed: 7", "r=4_lora_alpha=8/config.yaml".replace("/", "_"))
    in_directory = file.parent / "r=4" / "config.yaml"
    in_directory.parent.mkdir()
    file.rename(in_directory)

    assert compose(in_directory).seed == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b", "is not YAML"),
        ("- a\n- b", "holds no KEY: VALUE lines"),
        ("", "holds no KEY: VALUE lines"),
        ("a: 1\na: 2", "is not YAML"),
    ],
    ids=["broken", "a list", "empty", "a key twice"],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(my, text, message):
    file = my(text)

    with pytest.raises(ConfigError, match=message) as error:
        parse_arguments([str(file)])
    assert str(file) in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        parse_arguments(["nowhere.yaml"])


def test_a_file_after_overrides_is_told_its_place(my):
    with pytest.raises(ConfigError, match=r"A config file .* comes first"):
        parse_arguments(["lora.r=4", str(my("seed: 1"))])
