"""A machine that has nothing but the address of a bucket trains from there, and its records say the address."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub

from llmkit import rundir
from llmkit.config import load, save
from llmkit.config.arguments import parse_arguments
from llmkit.config.init_from import adapter_directory, find_start
from llmkit.config.schema import LoraConfig, ModelConfig, StorageConfig, TrainConfig
from llmkit.errors import ConfigError
from llmkit.remote import reach_with
from llmkit.storage import StorageError, open_place, upload_files

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "base_model_name_or_path": "org/base"}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    reach_with(StorageConfig())


@pytest.fixture
def run(tmp_path: Path, s3_url: str) -> Callable[..., str]:
    """A function: puts a finished run into the bucket and returns its address."""

    def put(model: ModelConfig, *, adapter: bool = False, status: str = "completed", name: str = "sft") -> str:
        directory = tmp_path / "made" / name
        final = directory / rundir.FINAL
        final.mkdir(parents=True)
        save(TrainConfig(model=model), directory)
        rundir.write_result(directory, status=status)
        (final / ("adapter_config.json" if adapter else "config.json")).write_text(json.dumps(ADAPTER))
        (final / ("adapter_model.safetensors" if adapter else "model.safetensors")).write_bytes(b"weights")
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "large").write_bytes(b"state")
        place = open_place(f"{s3_url}/runs/{name}", StorageConfig())
        files = [path for path in directory.rglob("*") if path.is_file()]
        upload_files(place, directory, [path.relative_to(directory).as_posix() for path in files])
        return place.url

    return put


def fetched(tmp_path: Path) -> set[str]:
    sets = tmp_path / "cache" / "objects" / "sets"
    return {path.name for path in sets.rglob("*") if path.is_file()}


def test_a_run_on_an_empty_machine_trains_from_the_bucket_alone(tmp_path, s3_url, tiny_model_dir, run_llmkit):
    here = {"LLMKIT_CACHE": str(tmp_path / "here")}
    with FakeHub({"org/tiny": tiny_model_dir}) as hub:
        env = hub.environment(tmp_path / "hf") | here
        done = run_llmkit("fetch", "model=org/tiny", f"to={s3_url}/model", env=env)
        assert done.returncode == 0, done.stderr
    done = run_llmkit("fetch", "data=demo", f"to={s3_url}/rows", env=here)
    assert done.returncode == 0, done.stderr

    words = [f"model.path={s3_url}/model", f"data.path={s3_url}/rows", "data.validation=validation", "name=a"]
    words += ["training.max_steps=2", "evaluation=off"]
    train(run_llmkit, *words)
    result = rundir.read_result(tmp_path / "runs/a") or {}
    assert (result["status"], result["steps"], result["base_model"]) == ("completed", 2, f"{s3_url}/model")
    config = load(tmp_path / "runs/a")
    assert (config.model.path, config.data.path) == (f"{s3_url}/model", f"{s3_url}/rows")
    card = (tmp_path / "runs/a/final/README.md").read_text()
    assert f"- base model: `{s3_url}/model`" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "runs/a/config.yaml").read_text()
    assert "Nothing to do" in train(run_llmkit, *words).stdout

    # The same rows on this machine are the same data set.
    words = [f"model.path={s3_url}/model", "data=demo", "name=b", "training.max_steps=1", "evaluation=off"]
    train(run_llmkit, *words)
    assert (rundir.read_result(tmp_path / "runs/b") or {})["dataset_fingerprint"] == result["dataset_fingerprint"]


def train(run_llmkit: Callable[..., Any], *words: str) -> subprocess.CompletedProcess[str]:
    done = run_llmkit("train", *words)
    assert done.returncode == 0, done.stderr
    return done


def test_a_preview_fetches_the_rows_and_no_weights(tmp_path, s3_url, tiny_model_dir, run_llmkit):
    names = [path.name for path in tiny_model_dir.iterdir() if path.is_file()]
    upload_files(open_place(f"{s3_url}/model", StorageConfig()), tiny_model_dir, names)
    rows = [json.dumps({"question": f"{n}+{n}?", "answer": str(2 * n)}) for n in range(30)]
    open_place(s3_url, StorageConfig()).write("rows.jsonl", "\n".join(rows).encode())

    done = run_llmkit("preview", f"model.path={s3_url}/model", f"data.path={s3_url}/rows.jsonl", "n=1")
    assert done.returncode == 0, done.stderr
    assert f"{s3_url}/rows.jsonl" in done.stdout
    assert "tokenizer.json" in fetched(tmp_path)
    assert not [name for name in fetched(tmp_path) if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["model.path={}/none", "data=demo"], 2, "model.path={}/none: there is nothing at this address in the bucket"),
        (["model.path={}/pickled", "data=demo"], 2, "model.path={}/pickled: has pytorch_model.bin but no .safetensors"),
        (["data.path={}/none.jsonl"], 2, "data.path={}/none.jsonl: there is no such file or directory in the bucket"),
        (["data.path=demo", "data.test={}/no.jsonl"], 2, "data.test.path={}/no.jsonl: there is no such file or direct"),
        (["data.path=s3://llmkit-not-there/a.jsonl"], 1, "s3://llmkit-not-there"),
        (["init_from={}/none", "data=demo"], 2, "init_from={}/none: there is nothing at this address in the bucket"),
    ],
    ids=["model", "pickled", "rows", "test rows", "bucket", "run"],
)
def test_what_is_not_there_is_one_message(s3_url, tmp_path, run_llmkit, words, code, said):
    for name in ("config.json", "pytorch_model.bin"):
        open_place(f"{s3_url}/pickled", StorageConfig()).write(name, b"{}")
    done = run_llmkit("train", *(word.format(s3_url) for word in words), "training.max_steps=1")

    assert done.returncode == code
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert said.format(s3_url) in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.path=s3:///models"], ["model.path=s3:///models: the name of the bucket is missing"]),
        (["model.path=gs://bucket/model"], ["model.path=gs://bucket/model: ", "s3://BUCKET/PATH"]),
        (["data.path=s3://b/rows"], ["data.path=s3://b/rows: 'b' is not a bucket's name"]),
        (["data.path=demo", "data.validation=s3://bucket/../rows"], ["data.validation=s3://bucket/../rows: ", "'..'"]),
        (["data.datasets=[{path: 'az://x/y.jsonl'}]"], ["data.datasets[0].path=az://x/y.jsonl: "]),
    ],
)
def test_an_address_that_is_not_well_formed_is_told_before_anything_starts(compose, words, said):
    with pytest.raises(ConfigError) as error:
        compose(*words)
    for word in said:
        assert word in str(error.value)


def test_addresses_stay_as_they_are_in_a_config(compose):
    config = compose("model.path=s3://bucket/m", "data.path=s3://bucket/rows", "data.test=test", "data.validation=0.1")

    assert (config.model.name, config.model.path) == ("custom", "s3://bucket/m")
    assert (config.data.name, config.data.path, config.data.test) == ("jsonl", "s3://bucket/rows", "test")


def test_a_run_in_a_bucket_is_known_by_its_small_files(run, tmp_path):
    address = run(ModelConfig(name="qwen3_0_6b", hub_id="Qwen/Qwen3-0.6B"), adapter=True)

    for given in (address, f"{address}/", f"{address}/final"):
        reach_with(StorageConfig())
        start = find_start(given)
        assert start.place == f"{address}/final"
        assert start.adapter == ADAPTER
        assert start.model.hub_id == "Qwen/Qwen3-0.6B"
    assert fetched(tmp_path) == {"config.yaml", "result.json", "adapter_config.json"}


def test_the_whole_adapter_comes_when_it_is_loaded(run, tmp_path):
    address = run(ModelConfig(name="qwen3_0_6b", hub_id="Qwen/Qwen3-0.6B"), adapter=True)

    directory = adapter_directory(TrainConfig(init_from=address, lora=LoraConfig()))
    assert directory
    assert {path.name for path in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_full_model_of_a_run_in_a_bucket_is_loaded_from_there(run, compose):
    address = run(ModelConfig(name="qwen3_0_6b", hub_id="Qwen/Qwen3-0.6B"))

    config = compose(f"init_from={address}", "data=demo", "method=full")
    assert config.init_from == address
    assert config.model.path == f"{address}/final"
    assert config.model.name == "qwen3_0_6b", "the option that goes with the run is composed"


def test_the_bucket_of_a_run_is_reached_as_the_command_says(run, s3_server, monkeypatch):
    address = run(ModelConfig(name="qwen3_0_6b", hub_id="Qwen/Qwen3-0.6B"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    words = [f"init_from={address}", "storage.max_attempts=1"]

    with pytest.raises(StorageError, match=r"s3://"):
        parse_arguments(words)
    assert "model=qwen3_0_6b" in parse_arguments([*words, f"storage.endpoint_url={s3_server.endpoint}"]).overrides


def test_a_run_in_a_bucket_that_is_not_finished_is_refused(run):
    address = run(ModelConfig(name="tiny"), status="preempted")

    with pytest.raises(ConfigError, match=r"this run is not finished \(its status: preempted\)"):
        find_start(address)


def test_a_directory_in_a_bucket_that_is_neither_run_nor_model_is_refused(s3_url):
    open_place(s3_url, StorageConfig()).write("rows.jsonl", b"{}\n")

    with pytest.raises(ConfigError, match=r"init_from=.*: neither a run directory \(config.yaml\)"):
        find_start(s3_url)


def test_an_adapter_whose_base_is_in_a_bucket_starts_from_there(s3_url):
    settings = ADAPTER | {"base_model_name_or_path": "s3://bucket/base"}
    open_place(s3_url, StorageConfig()).write("adapter_config.json", json.dumps(settings).encode())

    assert find_start(s3_url).model.path == "s3://bucket/base"
