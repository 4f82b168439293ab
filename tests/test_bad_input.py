"""A user's mistake ends in exit code 2 and one short message: key, value, what is legal, the nearest known name."""

import shutil
from pathlib import Path

import pytest

from llmkit import train
from llmkit.config.foreign import FOREIGN_NAMES
from llmkit.config.nodes import walk_schema
from llmkit.config.registration import group_names
from llmkit.config.schema import DataConfig, FreezeConfig, LoraConfig, ModelConfig
from llmkit.errors import ConfigError

SHORT = 900  # characters; the longest messages list the options of a group


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function: the words of a wrong `train` command -> its message, after the promises every message keeps."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> str:
        assert train.main(list(map(str, words))) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert_short_message(printed.err)
        assert not (tmp_path / "runs").exists(), "nothing is written"
        return printed.err

    return run


def assert_short_message(err: str) -> None:
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "one line"
    assert len(err) < SHORT
    assert "Traceback" not in err
    assert "Error executing job" not in err
    assert "HYDRA_FULL_ERROR" not in err


ONE_MISTAKE = {
    # the words -> what the message must hold
    "unknown option": ("model=tinylama", "model=tinylama", "Did you mean 'tinyllama'", "mistral7b", "model.path=DIR"),
    "capitals": ("model=QWEN3-8B", "Did you mean 'qwen3_8b'"),
    "unknown option of a sweep": ("-m method=lora,qlra", "method=qlra", "Did you mean 'qlora'", "freeze"),
    "unknown experiment": ("experiment=demo_ful", "experiment=demo_ful", "Did you mean 'demo_full'"),
    "unknown key": ("lora.dropuot=0.1", "lora.dropuot=0.1", "Did you mean 'lora.lora_dropout'", "lora_alpha"),
    "unknown key of another name": ("lora.rank=4", "lora.rank=4", "lora.r."),
    "unknown top-level key": ("sede=1", "sede=1", "Did you mean 'seed'", "objective"),
    "a key without its node": ("max_steps=10", "max_steps=10", "Did you mean 'training.max_steps'"),
    "a key in the wrong node": ("lora.seed=1", "lora.seed=1", "Did you mean 'seed'"),
    "an added key": ("+nonsense=1", "nonsense=1", "there is no key 'nonsense'"),
    "a removed key": ("~lora.r", "~lora.r", "lora.r=null"),
    "a node as a value": ("lora={r:4}", "'lora' holds several keys"),
    "a derived key": ("derived=[seed]", "derived", "llmkit fills it in"),
    "text for a whole number": ("lora.r=four", "lora.r=four", "a whole number", "at least 1"),
    "a fraction for a whole number": ("training.max_steps=1.5", "training.max_steps=1.5", "a whole number or null"),
    "text for a number": ("training.learning_rate=fast", "training.learning_rate=fast", "a number"),
    "text for a switch": ("lora.use_dora=maybe", "lora.use_dora=maybe", "true or false"),
    "a value for a list": ("freeze.patterns=x method=freeze", "freeze.patterns=x", "a list, [a,b]"),
    "null where a value is needed": ("lora.r=null", "lora.r=None", "a whole number"),
    "too small": ("lora.r=0", "lora.r=0", "at least 1"),
    "too large": ("lora.lora_dropout=1", "lora.lora_dropout=1", "at least 0 and less than 1"),
    "not positive": ("training.learning_rate=0", "training.learning_rate=0", "greater than 0"),
    "not finite": ("training.learning_rate=nan", "training.learning_rate=nan", "greater than 0"),
    "not one of the choices": ("training.final=bets", "training.final=bets", "last, best", "Did you mean 'best'"),
    "out of range in a sweep": ("-m lora.r=4,0", "lora.r=0", "at least 1"),
    "a node the method lacks": ("method=full lora.r=4", "lora.r=4", "method=full", "method=lora or method=qlora"),
    "a node one method of a sweep lacks": ("-m method=full,lora lora.r=4", "lora.r=4", "method=full", "of its own"),
    "a node the experiment's method lacks": ("experiment=demo_full lora.r=4", "lora.r", "method=lora or method=qlora"),
    "bits": ("method=qlora qlora.bits=2", "qlora.bits=2", "one of 4, 8"),
    "missing data": ("data.path=nowhere.jsonl", "data.path=nowhere.jsonl", "does not exist"),
    "missing held-out data": ("data.validation=nowhere.jsonl", "data.validation=nowhere.jsonl", "does not exist"),
    "a share over 1": ("data.validation=20", "data.validation=20", "a share between 0 and 1"),
    "a list of held-out data": ("data.validation=[a]", "data.validation=['a']", "a share between 0 and 1"),
    "missing model directory": ("model.path=nowhere", "model.path=nowhere", "does not exist"),
    "a model without a name": ("model=custom", "model=org/name", "model.path=DIR"),
    "rows without a place": ("data=jsonl", "data=jsonl", "data.path=FILE"),
    "longer than the model's context": ("model=phi2 data.max_length=4096", "data.max_length=4096", "2048"),
    "a list swept without brackets": (
        "-m lora.target_modules=q_proj,v_proj",
        "lora.target_modules=q_proj,v_proj",
        "'lora.target_modules=[q_proj,v_proj]'",
        "to sweep, 'lora.target_modules=[q_proj],[v_proj]'",
    ),
    "a list without brackets": ("lora.target_modules=q_proj,v_proj", "'lora.target_modules=[q_proj,v_proj]'"),
    "a module without brackets": ("lora.target_modules=q_proj", "[q_proj]", "all-linear"),
    "no module": ("lora.target_modules=[]", "lora.target_modules", "no parameter would be trained"),
    "nothing to train": ("method=freeze freeze.last_n_layers=0", "freeze", "last_n_layers, patterns"),
    "several values without -m": ("lora.r=4,8", "lora.r=4,8", "add -m"),
    "a sweep of --cfg": ("-m lora.r=4,8 --cfg job", "--cfg", "leave out -m"),
    "what --cfg shows": ("--cfg jbo", "--cfg jbo", "job, hydra, all"),
    "an unknown switch": ("--lora_r=4", "--lora_r", "KEY=VALUE"),
    "a switch without its value": ("--cfg", "--cfg", "a value must follow"),
    "no override": ("mistral7b", "'mistral7b'", "KEY=VALUE"),
    "an unreadable value": ("lora.r=[4", "lora.r=[4", "cannot be read"),
    "batch sizes": (
        "training.global_batch_size=10 training.per_device_train_batch_size=4",
        "training.global_batch_size=10",
        "training.per_device_train_batch_size=4",
        "make global_batch_size divide",
    ),
    "half a step": ("training.eval_steps=2.5", "training.eval_steps=2.5", "whole number of steps"),
    "a precision the card lacks": ("hardware=cpu precision=fp16", "precision=fp16", "hardware=cpu", "fp32, bf16"),
    "an unknown setting of Hydra": ("hydra.nonsense=1", "hydra.nonsense"),
    "an unknown launcher of Hydra": ("hydra/launcher=nonsense", "launcher=nonsense", "is one of local", "slurm"),
    "a secret": ("hardware.env.HF_TOKEN=hf_hunter2", "hardware.env.HF_TOKEN", "export HF_TOKEN"),
    "a secret of a sweep": (
        "-m lora.r=4,8 hardware.env.HF_TOKEN=hf_hunter2",
        "hardware.env.HF_TOKEN",
        "export HF_TOKEN",
    ),
    "a missing file": ("nowhere.yaml", "nowhere.yaml does not exist"),
}


@pytest.mark.parametrize(("words", "named"), [(v[0], v[1:]) for v in ONE_MISTAKE.values()], ids=ONE_MISTAKE)
def test_a_mistake_is_explained(refused, words, named):
    message = refused(*words.split())

    for fragment in named:
        assert fragment in message
    assert "hunter2" not in message, "a secret is not repeated"


def test_a_missing_data_file_names_the_nearest_in_its_directory(refused, tmp_path):
    (tmp_path / "chats.jsonl").touch()

    assert "Did you mean 'chats.jsonl'" in refused("data.path=chat.jsonl")


def test_all_mistakes_are_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mistakes = ["lora.rank=4", "modle=phi2", "training.max_steps=few", "data.validation=nowhere", "lora.r=0"]

    assert train.main(mistakes) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "4 errors:", "what only a composed config shows comes with the next try"
    for line, mistake in zip(lines, [m for m in mistakes if "validation" not in m], strict=True):
        assert line.startswith(f"  - {mistake}: ")


def test_all_mistakes_of_values_that_do_not_fit_are_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["data.path=nowhere.jsonl", "model.path=nowhere", "training.save_steps=2.5", "lora.target_modules=q_proj"]
    words += ["training.global_batch_size=3", "training.gradient_accumulation_steps=2"]

    assert train.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("5 errors:")
    for key in ("data.path", "model.path", "training.save_steps", "lora.target_modules", "training.global_batch_size"):
        assert f"\n  - {key}=" in err


def test_the_mistakes_of_all_jobs_of_a_sweep_are_told_before_any_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert train.main(["-m", "data.path=nowhere.jsonl,nothing.jsonl", "name=s"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("2 errors:")
    assert "nowhere.jsonl" in err
    assert "nothing.jsonl" in err
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_mistake_in_a_users_file_is_explained_like_one_on_the_command_line(refused, tmp_path):
    (tmp_path / "my.yaml").write_text("model: mistral\nlora:\n  r: 4\n")

    assert "Did you mean 'mistral7b'" in refused("my.yaml")


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_name_of_another_framework_points_to_a_key_of_ours(name):
    target = FOREIGN_NAMES[name].split("=")[0].split()[0]

    assert target in dict(walk_schema()) or target in group_names() or target in ("recipe", "run_dir")


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_name_of_another_framework_is_answered_with_ours(refused, name):
    assert FOREIGN_NAMES[name] in refused(f"{name}=1")


def test_the_names_the_issue_lists_are_known():
    names = "cutoff_len sequence_len micro_batch_size lora_rank lora_target val_set_size finetuning_type"

    assert set(names.split()) <= FOREIGN_NAMES.keys()


# What the worker finds: its own functions say it, and one real run shows that they are heard.


@pytest.fixture
def prepared(chats_file, tiny_tokenizer):
    """A function: prepare these rows; returns the message of the error it raises."""
    from llmkit.data.prepare import prepare_data

    def run(*rows: object, text: str | None = None, **settings: object) -> str:
        file = chats_file(*rows) if text is None else chats_file("")
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError) as error:
            prepare_data(DataConfig(path=str(file), validation=None, **settings), tiny_tokenizer, max_length=64)
        assert error.value.exit_code == 2
        assert str(file) in str(error.value)
        return str(error.value)

    return run


CHAT = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}


def test_an_empty_data_file_is_named(prepared):
    assert "holds no rows" in prepared(text="")
    assert "holds no rows" in prepared(text="\n\n")


def test_a_line_that_is_not_json_is_named_with_its_number(prepared):
    message = prepared(CHAT, "{'messages': []}")

    assert "line 2" in message
    assert "not JSON" in message


def test_a_line_that_is_no_object_is_named_with_its_number(prepared):
    assert "line 2: a JSON object is expected" in prepared(CHAT, [1, 2])


def test_a_file_that_is_not_text_is_named(tmp_path, tiny_tokenizer):
    from llmkit.data.prepare import prepare_data

    file = tmp_path / "chats.jsonl"
    file.write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(ConfigError, match=r"chats\.jsonl, line 1: not UTF-8"):
        prepare_data(DataConfig(path=str(file)), tiny_tokenizer, max_length=64)


def test_a_row_without_the_expected_columns_says_what_it_has_and_what_is_known(prepared):
    message = prepared({"task": "1+1?", "result": "2"})

    assert "row 1" in message
    assert "Found the columns task, result" in message
    assert "messages" in message
    assert "question_answer" in message


def test_a_later_row_without_the_columns_of_the_first_is_named(prepared):
    message = prepared(CHAT, {"text": "hello"})

    assert "row 2" in message
    assert "the column 'messages' is missing" in message
    assert "Found the columns text" in message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "must be a list of turns"),
        ([], "must be a list of turns"),
        ([{"role": "user"}], "a turn needs 'role' and 'content'"),
        ([{"role": "robot", "content": "hi"}], "role 'robot'"),
        ([{"role": "user", "content": 4}], "'content' must be text"),
        ([{"role": "user", "content": "hi"}], "1 of 2 rows have nothing to learn from"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(prepared, messages, said):
    message = prepared(CHAT, {"messages": messages})

    assert "row 2" in message
    assert said in message


def test_a_row_over_the_longest_length_is_named_with_what_would_help(prepared):
    long = {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]}
    message = prepared(CHAT, long)

    assert "1 of 2 rows exceed 64 tokens" in message
    assert "row 2" in message
    assert "data.on_overlong=drop" in message


@pytest.fixture(scope="session")
def tiny(tiny_model_dir):
    """The tiny model. Its weights are not changed here."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("target", ["q_porj", "qproj"])
def test_a_target_module_that_matches_nothing_names_the_nearest_and_those_there_are(tiny, target):
    from llmkit.model.methods import add_adapter

    with pytest.raises(ConfigError) as error:
        add_adapter(tiny, LoraConfig(target_modules=["v_proj", target]), quantized=False)
    message = str(error.value)
    assert f"lora.target_modules={target}: matches no module" in message
    assert "Did you mean 'q_proj'" in message
    assert "down_proj, gate_proj" in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (FreezeConfig(last_n_layers=9), "freeze.last_n_layers=9: the model has 3 layers"),
        (FreezeConfig(patterns=["nonsense"]), "'nonsense' matches no parameter"),
        (FreezeConfig(patterns=["("]), "'(' is not a regular expression"),
    ],
    ids=["too many layers", "no parameter", "no pattern"],
)
def test_freezing_that_leaves_nothing_is_explained(tiny, settings, said):
    from llmkit.model.methods import freeze

    with pytest.raises(ConfigError) as error:
        freeze(tiny, settings)
    assert said in str(error.value)


def load(directory: Path) -> None:
    import torch

    from llmkit.model.loading import load_model
    from llmkit.model.precision import KINDS

    config = ModelConfig(path=str(directory))
    load_model(config, dtype=torch.float32, device=torch.device("cpu"), quantization=None, precision=KINDS["fp32"])


def test_a_model_directory_without_weights_is_named(tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (copy / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match="no weights there") as error:
        load(copy)
    assert str(copy) in str(error.value)


def test_pickled_weights_are_refused_and_never_loaded(tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"pytorch_model\.bin but no \.safetensors"):
        load(copy)


def test_a_model_without_some_of_its_weights_is_refused(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigError, match=r"1 weights are missing .*lm_head\.weight"):
        load(copy)


QUICK = ["training.max_steps=1", "evaluation=off", "data.validation=null"]


def test_what_the_worker_refuses_reaches_the_user_as_one_message(run_llmkit, chats_file, tmp_path):
    file = chats_file(CHAT, "nonsense")
    done = run_llmkit("train", f"data.path={file}", *QUICK, "name=broken")

    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("warning: ")]
    assert_short_message("".join(errors))
    assert f"{file}, line 2: not JSON" in done.stderr
    assert not (tmp_path / "runs" / "broken").exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The working directory of a run named alpha that has finished."""
    cwd = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        assert train.main([*QUICK, "name=alpha"]) == 0
    return cwd


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_another_config_does_not_overwrite_a_finished_run(finished_run, monkeypatch, capsys):
    monkeypatch.chdir(finished_run)
    before = contents(finished_run)

    assert train.main([*QUICK, "name=alpha", "seed=7"]) == 2
    first, difference, ways = capsys.readouterr().err.splitlines()
    assert first.startswith("error: runs/alpha holds a finished run of another config")
    assert difference == "  seed: 42 -> 7"
    assert "name=" in ways
    assert contents(finished_run) == before


def test_the_same_config_says_that_its_run_is_finished(finished_run, monkeypatch, capsys):
    monkeypatch.chdir(finished_run)
    before = contents(finished_run)

    assert train.main([*QUICK, "name=alpha"]) == 0
    assert "runs/alpha holds this run, finished" in capsys.readouterr().out
    assert contents(finished_run) == before


def test_a_directory_of_something_else_is_not_taken(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()

    assert "not a run directory" in refused("run_dir=thesis", *QUICK)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
