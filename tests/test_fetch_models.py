"""`llmkit fetch model=...`: a hub model comes whole and verified, or says what is missing and goes on from there."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub

CHECKOUT = Path(__file__).parents[1]
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
}
# The same weights once more, and what nobody loads.
OTHERS = {
    ".gitattributes",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "gguf/model.Q4.gguf",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "pytorch_model-00001-of-00001.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
}
Fetch = Callable[..., subprocess.CompletedProcess[str]]


def content(name: str) -> bytes:
    """Different for each file, and large enough that its halves differ."""
    if name == "model.safetensors.index.json":
        parts = [name for name in sorted(FILES) if name.endswith(".safetensors")]
        return json.dumps({"weight_map": {part: part for part in parts}}).encode()
    return (name.encode() * 40_000)[: 400_000 if name.endswith("safetensors") else 500]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A repository that has everything several times."""
    for name in FILES | OTHERS:
        file = tmp_path / "repository" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(name))
    return tmp_path / "repository"


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[FakeHub]:
    """It has org/model and org/gated, which are the same, and org/pickled."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (pickled / name).write_bytes(content(name))
    models = {"org/model": model, "org/gated": model, "org/pickled": pickled}
    with FakeHub(models, gated={"org/gated"}) as hub:
        yield hub


@pytest.fixture
def fetch(hub: FakeHub, tmp_path: Path, run_llmkit: Callable[..., Any]) -> Fetch:
    """A function: runs `llmkit fetch` with this hub."""
    environment = hub.environment(tmp_path / "hf")

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return run_llmkit("fetch", *words, env=environment | {"LLMKIT_CACHE": str(tmp_path / "cache")} | env)

    return run


def done(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr
    return process.stdout


def names_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def is_whole(directory: Path) -> bool:
    """Whether the directory holds the model and its manifest, byte by byte, and nothing else."""
    manifest = json.loads((directory / "manifest.json").read_text())
    assert names_in(directory) == FILES | {"manifest.json"}
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == {
        name: len(content(name)) for name in FILES
    }
    return all(
        (directory / name).read_bytes() == content(name)
        and manifest["files"][name]["sha256"] == hashlib.sha256(content(name)).hexdigest()
        for name in FILES
    )


def test_a_model_comes_with_its_weights_once_and_nothing_pickled(fetch, tmp_path, hub):
    out = done(fetch("model=org/model", "to=models/mine"))

    assert is_whole(tmp_path / "models/mine")
    assert out.startswith("models/mine: org/model at 01234567, 7 files, 802 kB, verified; 7 of 7 files brought")
    assert out.splitlines()[-1] == "next: llmkit train model.path=models/mine"
    assert not [
        path for _, path in hub.requests for name in OTHERS if path.endswith(f"/{name}") and "/onnx/" not in path
    ]
    assert not list((tmp_path / "cache" / "fetching").glob("*[!k]"))


def test_the_manifest_says_where_the_files_come_from(fetch, tmp_path):
    done(fetch("model=org/model", "to=mine"))

    said = json.loads((tmp_path / "mine/manifest.json").read_text())
    assert said["source"] == {"hub_id": "org/model"}
    assert (said["revision"], said["commit"]) == ("main", COMMIT)


def test_what_is_there_is_not_fetched_again(fetch, tmp_path, hub):
    done(fetch("model=org/model", "to=mine"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").iterdir()}
    hub.requests.clear()

    assert "all there already" in done(fetch("model=org/model", "to=mine"))
    assert not [path for _, path in hub.requests if "/resolve/" in path]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").iterdir()} == before


def test_what_the_hugging_face_cache_has_is_not_downloaded(fetch, tmp_path, hub, run_llmkit):
    program = "import huggingface_hub; huggingface_hub.snapshot_download('org/model', allow_patterns=['*.safetensors'])"
    env = os.environ | hub.environment(tmp_path / "hf")
    subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True)
    hub.requests.clear()

    done(fetch("model=org/model", "to=mine"))
    assert is_whole(tmp_path / "mine")
    assert hub.downloads("tokenizer.json") == 1
    assert hub.downloads("model-00001-of-00002.safetensors") == 0


def test_a_damaged_file_in_the_hugging_face_cache_is_downloaded(fetch, tmp_path, hub):
    program = "import huggingface_hub; huggingface_hub.snapshot_download('org/model', allow_patterns=['*.safetensors'])"
    env = os.environ | hub.environment(tmp_path / "hf")
    subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True)
    weights = max((tmp_path / "hf").rglob("blobs/*"), key=lambda path: path.stat().st_size)
    weights.write_bytes(bytes(weights.stat().st_size))

    done(fetch("model=org/model", "to=mine"))
    assert is_whole(tmp_path / "mine")


def test_without_the_hub_a_model_in_its_cache_is_fetched_from_there(fetch, tmp_path, hub):
    program = (
        "import huggingface_hub\n"
        "huggingface_hub.snapshot_download('org/model', allow_patterns=['*.safetensors', '*.json', 'README.md'])"
    )
    env = os.environ | hub.environment(tmp_path / "hf")
    subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True)

    process = fetch("model=org/model", "to=mine", HF_HUB_OFFLINE="1")
    assert "its cache on this machine" in process.stderr
    done(process)
    assert is_whole(tmp_path / "mine")


def test_without_the_hub_a_model_that_is_not_whole_in_the_cache_is_refused(fetch, tmp_path, hub):
    program = "import huggingface_hub; huggingface_hub.snapshot_download('org/model', allow_patterns=['*.json'])"
    env = os.environ | hub.environment(tmp_path / "hf")
    subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True)

    process = fetch("model=org/model", "to=mine", HF_HUB_OFFLINE="1")
    assert process.returncode == 2
    assert "org/model is not in the local cache and the hub cannot be reached" in process.stderr
    assert not (tmp_path / "mine").exists()


# Interrupted and damaged


def test_a_file_that_was_damaged_on_the_way_is_fetched_again(fetch, tmp_path, hub):
    hub.damaged = {"model-00001-of-00002.safetensors": 1, "config.json": 1}

    done(fetch("model=org/model", "to=mine"))
    assert is_whole(tmp_path / "mine")
    assert hub.downloads("config.json") == 2


def test_a_file_that_stays_damaged_is_named_and_the_others_are_kept(fetch, tmp_path, hub):
    hub.damaged = {"tokenizer.json": 2}

    process = fetch("model=org/model", "to=mine")
    assert process.returncode == 1
    assert "org/model, tokenizer.json: what comes is not what the hub says it has" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "mine/manifest.json").exists()

    hub.requests.clear()
    done(fetch("model=org/model", "to=mine"))
    assert is_whole(tmp_path / "mine")
    assert hub.downloads("model-00001-of-00002.safetensors") == 0


def test_a_connection_that_breaks_is_taken_up(fetch, tmp_path, hub):
    hub.lost = {"model-00002-of-00002.safetensors": 1}

    done(fetch("model=org/model", "to=mine"))
    assert is_whole(tmp_path / "mine")


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_a_fetch_that_was_killed_goes_on_with_what_is_missing(fetch, tmp_path, hub, where, s3_url, s3_server):
    to = "mine" if where == "here" else s3_url
    hub.held["model-00002-of-00002.safetensors"] = 30.0  # seconds
    process = start(tmp_path, hub, to)
    deadline = time.monotonic() + 60
    journal = lambda: read_place(tmp_path, s3_server, to, ".manifest.partial.json")  # noqa: E731
    while len(json.loads(journal() or b'{"files": []}')["files"]) < len(FILES) - 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert read_place(tmp_path, s3_server, to, "manifest.json") is None
    hub.held.clear()
    hub.requests.clear()

    out = done(fetch("model=org/model", f"to={to}"))
    assert "1 of 7 files brought" in out
    assert hub.downloads("model-00001-of-00002.safetensors") == 0
    assert read_place(tmp_path, s3_server, to, ".manifest.partial.json") is None
    for name in FILES:
        assert read_place(tmp_path, s3_server, to, name) == content(name)
    assert read_place(tmp_path, s3_server, to, "manifest.json")


def test_ctrl_c_ends_at_once_and_says_nothing(fetch, tmp_path, hub):
    hub.held["model-00002-of-00002.safetensors"] = 60.0
    # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
    process = start(tmp_path, hub, "mine", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 60
    while not (tmp_path / "mine/.manifest.partial.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)

    assert process.returncode == 130
    assert err == ""


def start(tmp_path: Path, hub: FakeHub, to: str, **options: Any) -> subprocess.Popen[str]:
    env = hub.environment(tmp_path / "hf") | {"LLMKIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(CHECKOUT)}
    words = [sys.executable, "-m", "llmkit", "fetch", "model=org/model", f"to={to}"]
    return subprocess.Popen(words, cwd=tmp_path, env=os.environ | env, stderr=subprocess.PIPE, text=True, **options)


def read_place(tmp_path: Path, server: Any, to: str, name: str) -> bytes | None:
    """A file at the destination, or None."""
    if not to.startswith("s3://"):
        return (tmp_path / to / name).read_bytes() if (tmp_path / to / name).exists() else None
    bucket, _, prefix = to.removeprefix("s3://").partition("/")
    client = server.client()
    try:
        return client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()
    except client.exceptions.NoSuchKey:
        return None


# A bucket


def test_a_model_in_a_bucket_is_the_same_and_leaves_nothing_here(fetch, tmp_path, hub, s3_url, s3_server):
    out = done(fetch("model=org/model", f"to={s3_url}/mine"))

    for name in FILES:
        assert read_place(tmp_path, s3_server, f"{s3_url}/mine", name) == content(name)
    manifest = json.loads(read_place(tmp_path, s3_server, f"{s3_url}/mine", "manifest.json") or b"")
    assert manifest["files"].keys() == FILES
    assert out.splitlines()[-1] == f"next: llmkit train model.path={s3_url}/mine"
    assert names_in(tmp_path / "cache" / "fetching") == {path.name for path in (tmp_path / "cache").rglob("*.lock")}
    assert not (tmp_path / "hf/hub/models--org--model").exists(), "the Hugging Face cache is not filled on the way"

    hub.requests.clear()
    assert "all there already" in done(fetch("model=org/model", f"to={s3_url}/mine"))
    assert not [path for _, path in hub.requests if "/resolve/" in path]


def test_a_bucket_that_is_not_there_is_named(fetch, s3_url):
    process = fetch("model=org/model", "to=s3://llmkit-not-there/mine")

    assert process.returncode == 1
    assert process.stderr.startswith("error: s3://llmkit-not-there/mine")
    assert "there is no such bucket" in process.stderr


# What is asked for, and what is refused


def test_patterns_choose_files(fetch, tmp_path):
    done(fetch("model=org/model", "to=mine", "allow=[*.json,*.safetensors]", "ignore=[gen*]"))

    assert names_in(tmp_path / "mine") == FILES - {"README.md", "generation_config.json"} | {"manifest.json"}

    done(fetch("model=org/model", "to=mine"))
    assert is_whole(tmp_path / "mine")

    process = fetch("model=org/model", "to=mine", "allow=[*.json]")
    assert process.returncode == 2
    assert "to=mine: holds README.md, which these settings leave out" in process.stderr
    assert is_whole(tmp_path / "mine")


def test_several_models_come_one_after_the_other_and_one_that_fails_hides_no_other(fetch, tmp_path, hub):
    process = fetch("-m", "model=org/none,org/pickled,org/model", "to=models")

    assert process.returncode == 2
    assert is_whole(tmp_path / "models/model")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["model"]
    assert "org/none: no such model on the hub" in process.stderr
    assert "org/pickled at 01234567 has pytorch_model.bin but no .safetensors" in process.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=org/pickled"], ["pytorch_model.bin but no .safetensors", "pickled weights can run code"]),
        (["model=org/none"], ["org/none: no such model on the hub, or a private one", "HF_TOKEN"]),
        (["model=org/gated"], ["org/gated is gated: accept its licence", "HF_TOKEN"]),
        (["model=org/model", "model.revision=v9"], ["org/model has no revision 'v9'"]),
        (["model=org/model", "allow=[*.nothing]"], ["allow=['*.nothing']", "leave no file"]),
        (["model.path=here"], ["is not from the hub"]),
    ],
)
def test_what_cannot_be_had_is_told_in_one_message_and_leaves_nothing(fetch, tmp_path, words, said):
    process = fetch(*words, "to=mine")

    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: ")
    assert "Traceback" not in process.stderr
    for words in said:
        assert words in process.stderr
    assert not (tmp_path / "mine").exists()


def test_a_gated_model_is_fetched_with_a_token_which_is_written_nowhere(fetch, tmp_path):
    process = fetch("model=org/gated", "to=mine", HF_TOKEN="hf_secret_of_mine")

    done(process)
    assert is_whole(tmp_path / "mine")
    assert "hf_secret_of_mine" not in process.stdout + process.stderr
    assert not [path for path in (tmp_path / "mine").iterdir() if b"hf_secret_of_mine" in path.read_bytes()]


def holds_notes(to: Path) -> None:
    to.mkdir()
    (to / "notes.txt").write_text("mine")


def holds_another_model(to: Path) -> None:
    to.mkdir()
    (to / "config.json").write_text("{}")
    facts = {"config.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}}
    (to / "manifest.json").write_text(json.dumps({"files": facts, "source": {"hub_id": "org/other"}}))


def holds_an_edited_file(to: Path) -> None:
    shutil.copytree(to.parent / "whole", to)
    (to / "config.json").write_bytes(b"e" * (to / "config.json").stat().st_size)


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (holds_notes, "holds other things already (notes.txt)"),
        (holds_another_model, "comes from elsewhere, org/other"),
        (holds_an_edited_file, "config.json was changed after it was fetched"),
    ],
    ids=["notes", "another model", "an edited file"],
)
def test_what_the_user_has_there_stays(fetch, tmp_path, arrange, said):
    if arrange is holds_an_edited_file:
        done(fetch("model=org/model", "to=whole"))
    arrange(tmp_path / "mine")
    before = {name: (tmp_path / "mine" / name).read_bytes() for name in names_in(tmp_path / "mine")}

    process = fetch("model=org/model", "to=mine")
    assert process.returncode == 2
    assert f"to=mine: {'holds what ' if 'elsewhere' in said else ''}{said}" in process.stderr
    assert {name: (tmp_path / "mine" / name).read_bytes() for name in names_in(tmp_path / "mine")} == before


def test_a_file_that_was_deleted_is_brought_again(fetch, tmp_path):
    done(fetch("model=org/model", "to=mine"))
    (tmp_path / "mine/config.json").unlink()

    assert "1 of 7 files brought" in done(fetch("model=org/model", "to=mine"))
    assert is_whole(tmp_path / "mine")


def test_a_new_commit_brings_what_has_changed_and_removes_what_is_gone(fetch, tmp_path, hub, model):
    done(fetch("model=org/model", "to=mine"))
    (model / "README.md").unlink()
    (model / "config.json").write_bytes(b'{"new": true}')
    hub.commit = "f" * 40

    assert "1 of 6 files brought" in done(fetch("model=org/model", "to=mine"))
    assert names_in(tmp_path / "mine") == FILES - {"README.md"} | {"manifest.json"}
    assert (tmp_path / "mine/config.json").read_bytes() == b'{"new": true}'
    assert json.loads((tmp_path / "mine/manifest.json").read_text())["commit"] == "f" * 40


def test_a_disk_that_is_too_small_is_told_before_anything_comes(tmp_path, monkeypatch):
    from llmkit.config.schema import StorageConfig
    from llmkit.data.fetching.destination import Destination
    from llmkit.errors import LlmkitError
    from llmkit.model import fetching
    from llmkit.model.hub import HubFile

    files = [HubFile(name=str(n), size=n * 10**9, digest="") for n in (1, 2, 4, 8)]
    usage = lambda free: lambda _: shutil._ntuple_diskusage(0, 0, free)  # noqa: E731
    here = Destination(str(tmp_path / "mine"), StorageConfig())
    monkeypatch.setattr(shutil, "disk_usage", usage(12 * 10**9))
    with pytest.raises(LlmkitError, match=r"the files need 15 GB and the disk of .* has 12 GB free"):
        fetching._check_space(here, tmp_path / "scratch", files)

    bucket = Destination("s3://bucket/mine", StorageConfig())
    assert fetching._check_space(bucket, tmp_path / "scratch", files) == 2
    monkeypatch.setattr(shutil, "disk_usage", usage(7 * 10**9))
    with pytest.raises(LlmkitError, match=r"the largest needs 8 GB and the disk of .* has 7 GB free"):
        fetching._check_space(bucket, tmp_path / "scratch", files)
