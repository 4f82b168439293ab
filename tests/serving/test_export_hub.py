"""`llmkit export to=hub://...`: over HTTP against a hub on this machine, through huggingface_hub as it is."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub

CHECKOUT = Path(__file__).parents[2]
Export = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub({}, uploads=tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def export(hub: FakeHub, tuned_run: Path, tmp_path: Path) -> Export:
    """A function that runs `llmkit export run=runs/tuned to=hub://org/tuned` and more words, with the hub's token."""
    shutil.copytree(tuned_run, tmp_path / "runs" / "tuned")

    def run(*words: str, to: str = "hub://org/tuned", **environment: str) -> subprocess.CompletedProcess[str]:
        # Xet, which the hub itself takes files by, is a protocol of its own.
        own = {**hub.environment(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **environment}
        return subprocess.run(
            [sys.executable, "-m", "llmkit", "export", "run=runs/tuned", f"to={to}", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT)} | own,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def on_hub(hub: FakeHub, name: str = "org/tuned") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in hub.models[name].iterdir()}


def test_an_adapter_is_private_and_listed_before_it_is_sent(export, hub, tmp_path):
    done = export()

    assert done.returncode == 0, done.stderr
    final = {path.name: path for path in (tmp_path / "runs" / "tuned" / "final").iterdir()}
    assert on_hub(hub).keys() == final.keys()
    assert on_hub(hub)["adapter_model.safetensors"] == final["adapter_model.safetensors"].read_bytes()
    assert hub.private == {"org/tuned"}
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"hub://org/tuned (private) gets {len(final)} files, ")
    assert [line.split()[0] for line in lines[1:-1]] == sorted(final)
    assert lines[-1] == f"{hub.url}/org/tuned"
    assert "the base of this adapter is not from the hub" in done.stderr


def test_nothing_that_is_sent_names_a_place_or_a_secret_of_this_machine(export, hub, tmp_path):
    assert export(HF_TOKEN=TOKEN).returncode == 0

    sent = b"".join(on_hub(hub).values())
    assert os.environ["LLMKIT_CACHE"].encode() not in sent
    assert str(tmp_path).encode() not in sent
    assert TOKEN.encode() not in sent
    settings = json.loads(on_hub(hub)["adapter_config.json"])
    own = json.loads((tmp_path / "runs" / "tuned" / "final" / "adapter_config.json").read_text())
    assert settings.pop("base_model_name_or_path") == Path(own.pop("base_model_name_or_path")).name
    assert settings == own


def test_a_merged_model_is_public_only_when_asked(export, hub, tmp_path):
    done = export("merge=true", "public=true")

    assert done.returncode == 0, done.stderr
    assert hub.private == set()
    merged = tmp_path / "runs" / "tuned" / "merged"
    assert on_hub(hub).keys() == {path.name for path in merged.iterdir()}
    assert on_hub(hub)["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert b"merged" in on_hub(hub)["README.md"]
    assert str(tmp_path).encode() not in b"".join(on_hub(hub).values())


def test_the_same_again_sends_nothing_and_another_model_replaces_it_whole(export, hub):
    assert export().returncode == 0
    sent = [path for command, path in hub.requests if command == "PUT"]

    assert export().returncode == 0
    assert hub.commits == {"org/tuned": 1}
    assert [path for command, path in hub.requests if command == "PUT"] == sent

    assert export("merge=true").returncode == 0
    assert hub.commits == {"org/tuned": 2}
    assert "adapter_config.json" not in on_hub(hub)
    assert "model.safetensors" in on_hub(hub)


def strangers_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.models["org/tuned"] = tmp_path / "other"
    hub.models["org/tuned"].mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no token": ({"HF_TOKEN": ""}, "set HF_TOKEN to a token that may write to org"),
    "a wrong token": ({"HF_TOKEN": "hf_wrong_secret"}, "the token in HF_TOKEN is not valid, or has expired"),
    "somebody else's name": ({"to": "hub://other/tuned"}, "the token in HF_TOKEN may not write to other"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    "no hub": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "The same command tries again."),
}


@pytest.mark.parametrize(("change", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_message(export, hub, change, said):
    done = export(**change)

    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert "hf_wrong_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "status"), [("put", 403), ("batch", 402), ("commit", 413), ("preupload", 403)])
def test_a_refusal_half_way_says_why_and_the_same_command_goes_on(export, hub, kind, status):
    hub.refused[kind] = (status, "Storage limit reached, upgrade your plan")

    refused = export()

    assert refused.returncode == 1
    assert "Storage limit reached" in refused.stderr
    assert "Traceback" not in refused.stderr
    hub.refused.clear()
    assert export().returncode == 0
    assert hub.commits == {"org/tuned": 1}


def test_a_name_that_is_taken_by_something_else_is_left_alone(export, hub, tmp_path):
    strangers_model(hub, tmp_path)

    done = export()

    assert done.returncode == 2
    assert "the name is taken: the repository there holds config.json" in done.stderr
    assert on_hub(hub) == {"config.json": b"{}"}


@pytest.mark.parametrize("public", [True, False])
def test_a_repository_keeps_the_eyes_it_has(export, hub, public):
    words = ["public=true"] if public else []
    assert export(*words).returncode == 0

    done = export(*([] if public else ["public=true"]))

    assert done.returncode == 2
    assert f"the repository there is {'public' if public else 'private'}" in done.stderr
