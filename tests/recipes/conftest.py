"""Runs of the real recipe in this process, so that a test pays for its steps and not for an import."""

import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Run:
    run_dir: Path
    config: Any
    result: dict[str, Any]

    @property
    def final(self) -> Path:
        return self.run_dir / "final"

    def metrics(self) -> list[dict[str, Any]]:
        from llmkit.training.metrics import read_metrics

        return read_metrics(self.run_dir)


@pytest.fixture(scope="session")
def compose() -> Callable[..., Any]:
    """Overrides -> resolved, validated config, as the train verb makes it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    from llmkit.config import resolve, validate
    from llmkit.config.arguments import parse_arguments
    from llmkit.config.registration import register

    register()

    def make(*overrides: str) -> Any:
        with initialize_config_module("llmkit.conf", version_base="1.3"):
            composed = hydra_compose("train", overrides=parse_arguments(list(overrides)).overrides)
        config = resolve(composed)
        validate(config)
        return config

    return make


@pytest.fixture(scope="session")
def train(compose: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Train with the given overrides (default: 4 steps, no generated answers) and return the finished run."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from llmkit.launchers.prepare import prepare
    from llmkit.recipes import dpo, sft  # noqa: F401 - what they import is left out of collections, as in the worker
    from llmkit.training.console import RunConsole
    from llmkit.training.stopping import StopRequest

    gc.freeze()

    def run(*overrides: str, run_dir: Path | None = None, stop: StopRequest | None = None) -> Run:
        config = compose("evaluation=off", "training.max_steps=4", *overrides)
        run_dir = run_dir or tmp_path_factory.mktemp("run") / "run"
        # One process, one precision: accelerate remembers the first, so a new run starts from nothing.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()
        with prepare(config, run_dir):
            recipe = importlib.import_module(f"llmkit.recipes.{config.recipe}")
            result = recipe.run(config, run_dir, RunConsole(), stop or StopRequest())
        return Run(run_dir, config, result)

    yield run
    gc.unfreeze()


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers of recipe=dpo that this test's runs made, as they were left."""
    from llmkit.recipes import dpo

    made: list[Any] = []

    class Kept(dpo.PreferenceTrainer):
        def __init__(self, **arguments: Any):
            made.append(self)
            super().__init__(**arguments)

    monkeypatch.setattr(dpo, "PreferenceTrainer", Kept)
    return made
