"""What `init_from` may name, and what follows from it for the rest of the config."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llmkit import rundir
from llmkit.config import save
from llmkit.config.init_from import adapter_directory, adopt_init_from, find_start, implied_model
from llmkit.config.schema import DataConfig, LoraConfig, MethodConfig, ModelConfig, QloraConfig, TrainConfig
from llmkit.errors import ConfigError

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.1}
HUB = ModelConfig(
    name="qwen3_0_6b", hub_id="Qwen/Qwen3-0.6B", context_length=40960, commit="abc", chat_template="plain"
)
TINY = ModelConfig(name="tiny")


@pytest.fixture
def run(tmp_path):
    """A function: writes a finished run's directory, with an adapter or a full model, and returns it."""

    def write(
        model: ModelConfig = HUB, *, adapter: dict[str, Any] | None = None, name: str = "sft", **data: Any
    ) -> Path:
        directory = tmp_path / name
        final = directory / rundir.FINAL
        final.mkdir(parents=True)
        save(TrainConfig(model=dataclasses.replace(model), data=DataConfig(path="x.jsonl", **data)), directory)
        rundir.write_result(directory, status="completed")
        kind = "config.json" if adapter is None else "adapter_config.json"
        (final / kind).write_text(json.dumps(adapter or {}))
        return directory

    return write


def config(init_from: Path, method: str = "lora", **settings: Any) -> TrainConfig:
    lora = settings.pop("lora", LoraConfig() if method in ("lora", "qlora") else None)
    settings.setdefault("model", ModelConfig(name="custom"))
    return TrainConfig(
        init_from=str(init_from),
        method=MethodConfig(name=method),
        lora=lora,
        qlora=QloraConfig() if method == "qlora" else None,
        **settings,
    )


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora"])
def test_a_full_model_is_loaded_from_the_runs_final_directory(run, method):
    directory = run()
    adopted = config(directory, method)
    adopt_init_from(adopted)

    model = adopted.model
    assert (model.path, model.hub_id, model.commit) == (str(directory / "final"), None, None)
    assert (model.name, model.context_length, model.chat_template) == ("qwen3_0_6b", 40960, "keep-original")
    assert adapter_directory(adopted) is None


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_continued_on_its_base_in_its_own_shape(run, method):
    directory = run(adapter=ADAPTER)
    adopted = config(directory, method)
    adopt_init_from(adopted)

    assert adapter_directory(adopted) == directory / "final"
    model, lora = adopted.model, adopted.lora
    assert (model.hub_id, model.commit, model.path, model.chat_template) == (
        "Qwen/Qwen3-0.6B",
        "abc",
        None,
        "keep-original",
    )
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (4, 32, 0.1, ["q_proj", "v_proj"])


def test_a_run_repeated_from_its_own_config_is_the_same_run(run):
    first = config(run(adapter=ADAPTER))
    adopt_init_from(first)
    again = dataclasses.replace(first, model=dataclasses.replace(first.model), lora=dataclasses.replace(first.lora))
    adopt_init_from(again)

    assert again == first


def test_a_second_run_from_a_full_model_is_the_same_run(run):
    first = config(run(), "full")
    adopt_init_from(first)
    again = dataclasses.replace(first, model=dataclasses.replace(first.model))
    adopt_init_from(again)

    assert again == first


def test_a_run_that_itself_started_from_a_full_run_has_that_as_its_base(run, tmp_path):
    full = run()
    second = config(full)
    adopt_init_from(second)
    third = config(run(second.model, adapter=ADAPTER, name="second"))
    adopt_init_from(third)

    assert third.model.path == str(full / "final")


def test_a_shape_that_contradicts_the_adapter_is_refused_with_all_differences(run):
    asked = config(run(adapter=ADAPTER), lora=LoraConfig(r=16, lora_alpha=32, target_modules=["k_proj"]))

    with pytest.raises(ConfigError) as error:
        adopt_init_from(asked)
    said = str(error.value)
    assert "lora.r=16 (it has 4), lora.target_modules=['k_proj'] (it has ['v_proj', 'q_proj'])" in said
    assert "lora_alpha" not in said
    assert "merge it into its base first" in said


def test_a_derived_alpha_gives_way_to_the_adapters(run):
    asked = config(run(adapter=ADAPTER), lora=LoraConfig(lora_alpha=16), derived=["lora.lora_alpha"])
    adopt_init_from(asked)

    assert asked.lora.lora_alpha == 32


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_an_adapter_cannot_be_trained_in_full(run, method):
    with pytest.raises(ConfigError, match=rf"method={method}: this is an adapter\. Continue it with method=lora"):
        adopt_init_from(config(run(adapter=ADAPTER), method))


def test_an_adapter_of_another_kind_is_refused(run):
    with pytest.raises(ConfigError, match="an adapter of the kind IA3; llmkit continues LORA"):
        adopt_init_from(config(run(adapter={"peft_type": "IA3"})))


@pytest.mark.parametrize("adapter", [None, ADAPTER])
@pytest.mark.parametrize(
    "named",
    [ModelConfig(name="custom", hub_id="Qwen/Qwen3-0.6B"), dataclasses.replace(HUB), ModelConfig(name="qwen3_0_6b")],
)
def test_the_base_may_be_named_again(run, adapter, named):
    adopt_init_from(config(run(adapter=adapter), model=named))


@pytest.mark.parametrize(
    "named",
    [
        ModelConfig(name="phi2", hub_id="microsoft/phi-2"),
        ModelConfig(name="custom", hub_id="Qwen/Qwen3-0.6B", revision="v2"),
        ModelConfig(name="custom", path="/models/qwen"),
    ],
)
def test_another_base_is_refused(run, named):
    with pytest.raises(ConfigError, match=r"init_from=.* was made for Qwen/Qwen3-0\.6B; leave model out"):
        adopt_init_from(config(run(adapter=ADAPTER), model=named))


def test_the_demo_model_is_not_taken_for_a_choice(run):
    """Its option sets a learning rate too, so the right option must be composed."""
    with pytest.raises(ConfigError, match="say its model too, model=qwen3_0_6b"):
        adopt_init_from(config(run(), model=ModelConfig(name="tiny")))
    adopt_init_from(config(run(TINY, name="tiny"), model=ModelConfig(name="tiny")))


def test_what_the_new_run_says_of_loading_is_kept(run):
    asked = config(run(), model=ModelConfig(name="custom", attn_implementation="eager", trust_remote_code=True))
    adopt_init_from(asked)

    assert (asked.model.attn_implementation, asked.model.trust_remote_code) == ("eager", True)


def test_code_that_an_earlier_run_trusted_is_not_trusted_by_the_next(run):
    asked = config(run(dataclasses.replace(HUB, trust_remote_code=True)))
    adopt_init_from(asked)

    assert asked.model.trust_remote_code is False


def test_values_of_the_template_are_inherited_and_can_be_changed(run):
    directory = run(chat_template_kwargs={"enable_thinking": False, "tone": "dry"})
    asked = config(directory, data=DataConfig(chat_template_kwargs={"tone": "warm"}))
    adopt_init_from(asked)

    assert asked.data.chat_template_kwargs == {"enable_thinking": False, "tone": "warm"}


def test_relative_directories_are_recorded_as_absolute(run, monkeypatch):
    directory = run()
    monkeypatch.chdir(directory.parent)
    asked = config(Path("sft"))
    adopt_init_from(asked)

    assert asked.init_from == str(directory)


def test_the_final_directory_of_a_run_is_the_run(run):
    directory = run(adapter=ADAPTER)

    assert find_start(str(directory / "final")) == find_start(str(directory))


def test_a_directory_with_a_model_needs_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    asked = config(tmp_path, "full")
    adopt_init_from(asked)

    assert asked.model.path == str(tmp_path)


@pytest.mark.parametrize("base", ["hub", "directory"])
def test_a_directory_with_an_adapter_names_its_base(tmp_path, base):
    directory, own = tmp_path / "adapter", tmp_path / "base"
    directory.mkdir()
    own.mkdir()
    told = {"base_model_name_or_path": str(own) if base == "directory" else "org/name", "revision": "v1"}
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER | told))
    asked = config(directory)
    adopt_init_from(asked)

    found = (asked.model.path, asked.model.hub_id, asked.model.revision)
    assert found == ((str(own), None, "main") if base == "directory" else (None, "org/name", "v1"))


def test_an_adapter_without_a_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(ConfigError, match=r"adapter_config\.json names no base model"):
        adopt_init_from(config(tmp_path))


def test_a_directory_that_is_not_there_is_answered_with_the_nearest(run):
    directory = run()
    with pytest.raises(ConfigError, match=r"there is no such directory .*Did you mean 'sft'"):
        find_start(str(directory.with_name("sfl")))


@pytest.mark.parametrize("status", [None, "failed", "preempted"])
def test_an_unfinished_run_is_refused(run, status):
    directory = run()
    rundir.write_result(directory, status=status)

    with pytest.raises(ConfigError, match=f"is not finished .its status: {status or 'unfinished'}.*own command again"):
        find_start(str(directory))


def test_a_run_that_is_still_going_on_is_refused(run):
    directory = run()
    (directory / rundir.RESULT).unlink()

    with pytest.raises(ConfigError, match=r"is not finished"):
        find_start(str(directory))


def test_a_run_without_weights_is_refused(run):
    directory = run()
    (directory / "final" / "config.json").unlink()
    (directory / "final").rmdir()

    with pytest.raises(ConfigError, match=r"this run has no final/"):
        find_start(str(directory))


def test_a_sweep_is_answered_with_its_runs(tmp_path):
    jobs = [{"run_dir": "sweep/r=4", "status": "completed"}, {"run_dir": "sweep/r=8", "status": "failed"}]
    (tmp_path / rundir.SWEEP).write_text(json.dumps({"jobs": jobs}))

    with pytest.raises(ConfigError, match=r"holds a sweep; choose one of its runs: sweep/r=4\."):
        find_start(str(tmp_path))


def test_any_other_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a run directory"):
        find_start(str(tmp_path))


def test_a_config_without_it_stays_as_it_is():
    untouched = TrainConfig(model=ModelConfig(name="tiny"))
    adopt_init_from(untouched)

    assert untouched == TrainConfig(model=ModelConfig(name="tiny"))
    assert adapter_directory(untouched) is None


def test_the_model_of_the_run_is_implied_on_the_command_line(run, tmp_path):
    hub, tiny, own = run(), run(TINY, name="it's"), run(ModelConfig(name="mine", path="/m"), name="own")
    from llmkit.config.grammar import to_grammar

    hub, tiny, own = (to_grammar(str(directory)) for directory in (hub, tiny, own))
    assert implied_model(hub) == "qwen3_0_6b"
    assert implied_model(tiny) == "tiny"
    assert implied_model(own) == "custom"
    assert implied_model(f"{hub},{hub}") == "qwen3_0_6b"
    assert implied_model(f"{hub},{tiny}") is None
    assert implied_model(to_grammar(str(tmp_path / "nothing"))) is None
    assert implied_model("null") is None
