"""`config.yaml`: read back it is the config that was written, given to `train` it repeats the run, no secret in it."""

import copy

import pytest
from omegaconf import OmegaConf

from llmkit.config import differences, load, save
from llmkit.config.nodes import GROUPS
from llmkit.errors import ConfigError

CONFIGS = {
    "the default": [],
    "qlora": ["method=qlora", "model=phi2", "lora.target_modules=[q_proj,v_proj]", "lora.modules_to_save=[lm_head]"],
    "freeze": ["method=freeze", "freeze.patterns=['a,b','c=d{2}']", "data.validation=0.1"],
    "dpo": ["recipe=dpo", "dpo.loss_type=[ipo,sft]", "dpo.loss_weights=[1,0.5]", "dpo.ld_alpha=0.5"],
    "mappings": ["data.columns.question=Problem, the", "data.chat_template_kwargs.thinking=false"],
    "full": ["method=full", "evaluation=off", "hardware=rtx4090", "training.global_batch_size=32"],
    "odd text": ['tracking.run_name=it\'s, "a" \\ ü\n$x', "model.pad_token=\\${a}", "tracking.tags=['1','null','off']"],
}


@pytest.mark.parametrize("words", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_config_is_read_back_equal(compose, tmp_path, words):
    config = compose(*words, f"run_dir={tmp_path}")
    save(config, tmp_path)

    assert load(tmp_path) == config


@pytest.mark.parametrize("words", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_config_repeats_the_run(compose, tmp_path, words):
    config = compose(*words)
    save(config, tmp_path)

    assert compose(tmp_path / "config.yaml") == config


def test_text_that_looks_like_an_interpolation_stays_text(compose, tmp_path):
    config = compose()
    config.tracking.run_name = "${not.a.key} \\${nor} \\\\${this}"
    save(config, tmp_path)

    assert load(tmp_path).tracking.run_name == config.tracking.run_name


def test_a_repeated_run_derives_again_what_was_derived(compose, tmp_path):
    save(compose("lora.r=4", "training.per_device_train_batch_size=2"), tmp_path)
    config = compose(tmp_path / "config.yaml", "lora.r=16", "training.per_device_train_batch_size=4")

    assert config.lora.lora_alpha == 32
    assert (config.training.global_batch_size, config.training.gradient_accumulation_steps) == (4, 1)


def test_a_repeated_run_asks_its_own_machine_what_the_first_found_out(compose, tmp_path):
    config = compose()
    config.precision.name, config.hardware.device, config.data.max_length = "fp32", "cpu", 2048
    config.derived += ["precision.name", "hardware.device", "data.max_length"]
    save(config, tmp_path)
    again = compose(tmp_path / "config.yaml")

    assert (again.precision.name, again.hardware.device, again.data.max_length) == ("auto", "auto", None)


def test_a_repeated_run_keeps_the_commit_that_the_first_found(compose, tmp_path):
    config = compose("model=phi2")
    config.model.commit = "0123abc"
    save(config, tmp_path)

    assert compose(tmp_path / "config.yaml").model.commit == "0123abc"
    assert compose(tmp_path / "config.yaml", "model=mistral7b").model.commit is None


def test_a_repeated_run_has_its_own_place(compose, tmp_path):
    save(compose("name=alpha", "run_dir=here"), tmp_path)
    written = OmegaConf.load(tmp_path / "config.yaml")

    assert "name" not in written
    assert "run_dir" not in written


def test_the_file_says_how_to_repeat_the_run(compose, tmp_path):
    save(compose(), tmp_path)

    assert (tmp_path / "config.yaml").read_text().splitlines()[0].endswith(f"llmkit train {tmp_path}/config.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a run directory"),
        ("lora: {r: x}", "lora.r"),
        ("nonsense: 1", "nonsense"),
        ("a: [", "config.yaml"),
        ("- a", "config.yaml"),
    ],
    ids=["missing", "wrong type", "unknown key", "no YAML", "a list"],
)
def test_a_broken_config_is_an_error_that_names_the_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("key", ["hardware.env.HF_TOKEN", "hardware.env.MY_SECRET", "hardware.env.WANDB_API_KEY"])
def test_a_secret_is_refused_and_not_repeated(compose, key):
    with pytest.raises(ConfigError, match=key) as error:
        compose(f"{key}=hunter2")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_of_the_environment_is_never_resolved(compose, monkeypatch, name):
    monkeypatch.setenv(name, "hunter2")

    with pytest.raises(ConfigError, match=name) as error:
        compose("tracking.entity=${oc.env:" + name + "}")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "KEYBOARD"])
def test_an_ordinary_variable_is_no_secret(compose, name):
    assert compose(f"hardware.env.{name}=false").hardware.env[name] == "false"


def test_equal_configs_have_no_differences(compose):
    assert differences(compose(), compose()) == []


def test_a_difference_names_the_key_and_both_values(compose):
    assert differences(compose("seed=1"), compose("seed=2")) == ["seed: 1 -> 2"]


def test_a_node_that_only_one_has_is_a_difference(compose):
    lines = differences(compose(), compose("method=full"))

    assert "method.name: lora -> full" in lines
    assert "lora.r: 8 -> None" in lines


@pytest.mark.parametrize("words", [["name=other"], ["run_dir=other"], ["launcher.max_parallel=2"]], ids=str)
def test_where_and_how_a_run_is_started_is_no_difference(compose, words):
    assert differences(compose(), compose(*words)) == []


def test_what_the_worker_filled_in_is_no_difference_while_it_is_left_open(compose):
    new = compose()
    old = copy.deepcopy(new)
    old.precision.name, old.model.commit = "fp32", "0123abc"
    old.derived.append("precision.name")

    assert differences(old, new) == []
    assert differences(old, compose("precision=bf16")) == ["precision.name: fp32 -> bf16"]


def test_a_value_that_the_first_run_was_given_is_a_difference_when_left_open(compose):
    assert differences(compose("precision=fp32"), compose()) == ["precision.name: fp32 -> auto"]


def test_environment_variables_are_compared_as_one_value(compose):
    lines = differences(compose("hardware.env.A=1"), compose("hardware.env.A=2"))

    assert lines == ["hardware.env: {'A': '1'} -> {'A': '2'}"]


NAMELESS = ("training", "checkpoint", "evaluation")  # their options are nothing but values
OF_SWEEPS = ("sweeper",)  # a run has none


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in NAMELESS + OF_SWEEPS])
def test_a_repeated_run_chooses_the_same_option_of_every_group(compose, tmp_path, group):
    from llmkit.config.registration import group_options

    option = "gsm8k" if group == "data" else group_options(group)[-1]
    save(compose(f"{group}={option}"), tmp_path)

    assert getattr(compose(tmp_path / "config.yaml"), group).name == option


def test_how_one_command_was_to_go_on_is_not_repeated_and_what_is_switched_off_stays_off(compose, tmp_path):
    save(compose("checkpoint=off", "resume=never", "resume_allow=[seed]"), tmp_path)

    repeated = compose(tmp_path / "config.yaml")

    assert repeated.checkpoint.minutes is None
    assert (repeated.resume, repeated.resume_allow) == ("auto", [])


def test_what_resume_allow_names_is_no_difference(compose):
    old, other = compose(), ("seed=1", "training.max_steps=9", "data.max_length=99")

    (line,) = differences(old, compose(*other, "resume_allow=[seed,training]"))
    assert line.startswith("data.max_length: ")
    assert differences(old, compose(*other, "resume_allow=[seed,training,data]")) == []


def test_local_files_are_named_by_absolute_paths_and_names_of_options_are_not(
    compose, chats_file, tmp_path, monkeypatch
):
    from llmkit.config.resolve import use_absolute_paths

    monkeypatch.chdir(tmp_path)
    chats_file(name="mine.jsonl")
    (tmp_path / "mine.jinja").touch()
    config = compose("data.path=mine.jsonl", "data.chat_template=mine.jinja", "model.chat_template=plain")

    use_absolute_paths(config)

    assert config.data.path == str(tmp_path / "mine.jsonl")
    assert config.data.chat_template == str(tmp_path / "mine.jinja")
    assert config.model.chat_template == "plain"
    assert config.data.validation == 0.05
