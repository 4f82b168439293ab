"""What is typed reaches the config as it was typed, in any order, and alone it is enough."""

import pytest

from llmkit.config.arguments import parse_arguments
from llmkit.errors import ConfigError

ODD_NAMES = [
    "a=b.jsonl",
    "a,b.jsonl",
    "a b.jsonl",
    "a'b.jsonl",
    'a"b.jsonl',
    "(1)[2]{3}.jsonl",
    "$HOME.jsonl",
    "1e5",  # a directory, of which rows are in a file
    "007",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("switch", [[], ["-m"]], ids=["single", "sweep"])
def test_a_path_reaches_the_config_as_typed(compose, here, name, switch):
    rows = here / name if name.endswith(".jsonl") else here / name / "rows.jsonl"
    rows.parent.mkdir(exist_ok=True)
    rows.touch()
    config = compose(f"data.path={name}", *switch)

    assert (config[0] if switch else config).data.path == name


@pytest.mark.parametrize("key", ["tracking.run_name", "model.pad_token", "run_dir", "name"])
def test_any_text_is_taken_as_typed(compose, key):
    config = compose(f"{key}=<|a, b = c|>")
    node, _, field = key.rpartition(".")

    assert getattr(getattr(config, node) if node else config, field) == "<|a, b = c|>"


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("data.columns.question=a, b = c", "columns", {"question": "a, b = c"}),
        ("data.columns={question: Problem}", "columns", {"question": "Problem"}),
        ("data.chat_template_kwargs.enable_thinking=false", "chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_a_mapping_takes_any_key_and_values_of_its_type(compose, typed, key, value):
    assert getattr(compose(typed).data, key) == value


@pytest.mark.parametrize("typed", ["[<|a|>,<|b|>]", "[<|a|>, <|b|>]", "['<|a|>','<|b|>']"])
@pytest.mark.parametrize("switch", [[], ["-m"]], ids=["single", "sweep"])
def test_a_list_of_texts_is_taken_as_typed(compose, typed, switch):
    config = compose(f"data.special_tokens={typed}", *switch)

    assert (config[0] if switch else config).data.special_tokens == ["<|a|>", "<|b|>"]


def test_a_url_with_a_query_is_taken_as_typed(compose):
    assert compose("run_dir=s3://bucket/a?b=c,d&e=f").run_dir == "s3://bucket/a?b=c,d&e=f"


def test_a_path_in_the_home_directory_is_found(compose, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "rows.jsonl").touch()

    assert compose("data.path=~/rows.jsonl").data.path == str(here / "rows.jsonl")


def test_in_a_sweep_commas_separate_paths(compose, here):
    for name in ("a=1.jsonl", "b 2.jsonl"):
        (here / name).touch()

    assert [job.data.path for job in compose("-m", "data.path=a=1.jsonl,b 2.jsonl")] == ["a=1.jsonl", "b 2.jsonl"]


@pytest.mark.parametrize(("typed", "value"), [("0.1", 0.1), ("null", None), ("a=b.jsonl", "a=b.jsonl")])
def test_validation_takes_a_share_a_file_or_nothing(compose, here, typed, value):
    (here / "a=b.jsonl").touch()

    assert compose(f"data.validation={typed}").data.validation == value


def test_a_quoted_value_is_taken_without_its_quotes(compose, here):
    (here / "a,b.jsonl").touch()

    assert compose("data.path='a,b.jsonl'").data.path == "a,b.jsonl"


@pytest.mark.parametrize(
    "words", ["-m method=lora lora.r=4,8", "method=lora -m lora.r=4,8", "method=lora lora.r=4,8 -m"]
)
@pytest.mark.parametrize("switch", ["-m", "--multirun"])
def test_the_sweep_flag_may_stand_anywhere(compose, words, switch):
    jobs = compose(*words.replace("-m", switch).split())

    assert [job.lora.r for job in jobs] == [4, 8]


@pytest.mark.parametrize(
    ("sweep", "ranks"),
    [("lora.r=range(2,7,2)", [2, 4, 6]), ("lora.r=choice(3,5)", [3, 5]), ("lora.r=sort(9,1)", [1, 9])],
)
def test_hydras_sweep_functions_work(compose, sweep, ranks):
    assert [job.lora.r for job in compose("-m", sweep)] == ranks


def test_a_glob_sweeps_over_the_options_of_a_group(compose):
    assert [job.model.name for job in compose("-m", "model=glob(mistral*)")] == ["mistral7b", "mistral7b_instruct"]


def test_several_keys_sweep_over_their_combinations(compose):
    jobs = compose("-m", "lora.r=4,8", "seed=1,2")

    assert [(job.lora.r, job.seed) for job in jobs] == [(4, 1), (4, 2), (8, 1), (8, 2)]


def test_bracketed_lists_sweep_over_lists(compose):
    jobs = compose("-m", "lora.target_modules=[q_proj],[q_proj,v_proj],all-linear")

    assert [job.lora.target_modules for job in jobs] == [["q_proj"], ["q_proj", "v_proj"], "all-linear"]


def test_a_name_with_a_slash_is_a_hub_model(compose):
    config = compose("model=org/name")

    assert (config.model.name, config.model.hub_id) == ("custom", "org/name")


def test_hub_models_can_be_swept(compose):
    jobs = compose("-m", "model=org/one,org/two")

    assert [job.model.hub_id for job in jobs] == ["org/one", "org/two"]


def test_a_hub_id_and_a_revision_override_those_of_a_shipped_model(compose):
    config = compose("model=phi2", "model.hub_id=my/phi", "model.revision=v2")

    assert (config.model.hub_id, config.model.revision, config.model.context_length) == ("my/phi", "v2", 2048)


@pytest.mark.parametrize("directory", ["./models/mine", "/models/mine", "../mine", "a/b/c"])
def test_a_directory_is_no_hub_id(directory):
    with pytest.raises(ConfigError, match=f"model.path={directory}"):
        parse_arguments([f"model={directory}"])


def test_hub_ids_and_shipped_names_do_not_mix_in_a_sweep():
    with pytest.raises(ConfigError, match="mixes hub ids with the shipped names tiny"):
        parse_arguments(["-m", "model=tiny,org/name"])


def test_a_data_file_alone_takes_the_place_of_the_demo(compose, chats_file):
    config = compose(f"data.path={chats_file()}")

    assert (config.data.name, config.data.format, config.data.validation) == ("jsonl", "auto", 0.05)


def test_a_list_of_sources_alone_takes_the_place_of_the_demo(compose, chats_file):
    config = compose(f"data.datasets=[{{path: {chats_file()}}},{{path: {chats_file(name='more.jsonl')}, limit: 3}}]")

    assert (config.data.name, config.data.path, config.data.validation) == ("jsonl", None, 0.05)
    assert [source.limit for source in config.data.datasets] == [None, 3]


def test_a_model_directory_alone_takes_the_place_of_the_tiny_model(compose, here):
    config = compose(f"model.path={here}")

    assert config.model.name == "custom"
    assert config.training.max_steps is None


def test_a_path_belongs_to_the_group_that_was_chosen(compose, here):
    (here / "train.jsonl").touch()
    (here / "test.jsonl").touch()
    assert compose("data=gsm8k", f"data.path={here}").data.format == "question_answer"


def test_a_path_takes_the_place_of_the_demo_under_an_experiment_that_leaves_the_data_open(compose, chats_file):
    assert compose("experiment=demo_full", f"data.path={chats_file()}").data.name == "jsonl"


def test_a_path_belongs_to_the_data_that_an_experiment_chooses(compose, here):
    own = here / "own" / "experiment"
    own.mkdir(parents=True)
    (here / "train.jsonl").touch()
    (here / "test.jsonl").touch()
    (own / "maths.yaml").write_text("# @package _global_\ndefaults:\n  - override /data: gsm8k\n")
    config = compose("--config-dir", here / "own", "experiment=maths", f"data.path={here}")

    assert config.data.format == "question_answer"


def test_the_last_choice_of_a_group_wins(compose):
    assert compose("model=tiny", "model=phi2").model.name == "phi2"


def test_a_demo_model_on_other_data_is_warned_of(compose, chats_file):
    from llmkit.config import warnings

    assert any("model=tiny" in warning for warning in warnings(compose(f"data.path={chats_file()}")))
    assert warnings(compose()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["training.num_train_epochs=5"], "training.num_train_epochs=5"),
        (["method=qlora", "qlora.bits=8", "qlora.bnb_4bit_use_double_quant=false"], "qlora.bnb_4bit_use_double_quant"),
        (["model=phi2", "data=demo", "model.path=."], "model.hub_id=microsoft/phi-2"),
        (["data.validation=null", "training.final=best"], "training.final=best"),
        (["tracking.tags=[a]"], "tracking.tags"),
        (["training.lr_scheduler_type=constant"], "training.warmup_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_setting_without_effect_is_warned_of(compose, words, named):
    from llmkit.config import warnings

    assert [warning for warning in warnings(compose(*words)) if named in warning]
