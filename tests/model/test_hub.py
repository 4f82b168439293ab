"""Models from the hub: a download works with an empty cache, and a refusal ends in one message that says what to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

CHECKOUT = Path(__file__).parents[2]
# The worker's own calls, in its order, for each case of argv. The hub's client waits between its tries: not here.
LOAD = """
import json, os, sys, time
time.sleep = lambda seconds: None
import torch
from llmkit.config.schema import ModelConfig
from llmkit.errors import ConfigError
from llmkit.model.loading import cached_commit, load_model, load_model_config, load_tokenizer
from llmkit.model.precision import KINDS

def load(config):
    load_model_config(config)
    config.commit = cached_commit(config)
    tokenizer = load_tokenizer(config, "keep-original")
    options = dict(dtype=torch.float32, device=torch.device("cpu"), quantization=None, precision=KINDS["fp32"])
    model = load_model(config, **options)
    return f"{config.commit} {model.num_parameters()} {tokenizer.decode(tokenizer('1+1?')['input_ids'])}"

for settings, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        print(load(ModelConfig(**settings)))
    except ConfigError as error:
        print(f"refused: {error}")
"""
LOADED = f"{COMMIT} 754560 1+1?"


@pytest.fixture(scope="module")
def hub(tiny_model_dir, tmp_path_factory):
    pickled = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("pickled") / "model")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    models = {"org/tiny": tiny_model_dir, "org/gated": tiny_model_dir, "org/pickled": pickled}
    with FakeHub(models, gated={"org/gated"}) as hub:
        yield hub


def load(*cases, env):
    """Load models in a process of its own, since it reads HF_ENDPOINT on import; one line comes back for each."""
    code = [sys.executable, "-c", LOAD, json.dumps(cases)]
    done = subprocess.run(code, env=os.environ | env, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), "each is one line"
    return lines


CASES = {
    "with a token": ({"hub_id": "org/gated"}, "hf_anything"),
    "without a token": ({"hub_id": "org/gated"}, ""),
    "not there": ({"hub_id": "org/none"}, ""),
    "not there and gated": ({"hub_id": "org/none", "gated": True}, ""),
    "revision not there": ({"hub_id": "org/tiny", "revision": "v9"}, ""),
    "pickled": ({"hub_id": "org/pickled"}, ""),
}


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory):
    """Case -> what loading it said."""
    lines = load(*CASES.values(), env=hub.environment(tmp_path_factory.mktemp("home")))
    return dict(zip(CASES, lines, strict=True))


def test_a_model_is_downloaded_once_and_then_there_without_the_hub(hub, tmp_path):
    hub.requests.clear()
    model, home = ({"hub_id": "org/tiny"}, ""), hub.environment(tmp_path)

    assert load(model, env=home) == [LOADED]
    assert ("GET", f"/org/tiny/resolve/{COMMIT}/model.safetensors") in hub.requests
    hub.requests.clear()
    assert load(model, env=home | {"HF_HUB_OFFLINE": "1"}) == [LOADED]
    assert hub.requests == []


def test_a_gated_model_is_loaded_with_a_token(answers):
    assert answers["with a token"] == LOADED


@pytest.mark.parametrize("case", ["without a token", "not there and gated"])
def test_a_gated_model_without_a_token_says_how_to_get_in(answers, case):
    assert answers[case].startswith(f"refused: model=custom: {CASES[case][0]['hub_id']} is gated: accept its licence")
    assert "HF_TOKEN" in answers[case]


def test_a_model_that_is_not_there_may_be_a_private_one(answers):
    assert "org/none: no such model on the hub, or a private one (then set HF_TOKEN)" in answers["not there"]


def test_a_revision_that_is_not_there_is_named(answers):
    assert "org/tiny has no revision 'v9'; see model.revision" in answers["revision not there"]


def test_pickled_weights_are_not_loaded_and_not_sent_to_be_converted(hub, answers):
    assert "org/pickled has no .safetensors; pickled weights can run code" in answers["pickled"]
    asked = [path for _, path in hub.requests if "org/pickled" in path]
    assert asked
    assert not [path for path in asked if "pytorch_model.bin" in path or "commits" in path]


@pytest.mark.parametrize(
    "env",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],  # no one listens there
    ids=["offline", "refused"],
)
def test_a_hub_out_of_reach_says_what_to_do(tmp_path, env):
    (message,) = load(({"hub_id": "org/tiny", "gated": True}, ""), env=env | {"HF_HOME": str(tmp_path)})

    assert message.startswith("refused: model=custom: org/tiny is not in the local cache and the hub cannot be reached")
    for words in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "model.path=DIR", "HF_TOKEN"):
        assert words in message
