"""What all tests share: a closed world (own caches, no network, no keys), the tiny model, and ways to start llmkit."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import hydra
import pytest
from hydra.plugins.launcher import Launcher
from ray_cluster import ray_cluster, ray_token  # noqa: F401 - fixtures for all tests
from s3_server import s3_server, s3_url  # noqa: F401 - fixtures for all tests
from slurm_cluster import slurm  # noqa: F401 - a fixture for all tests

# Read when torch is loaded, here and in children. Processes that train side by side with a thread for each core wait
# for one another at every operation; and on models as small as these a second thread gains nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when huggingface_hub is imported, which test modules do before any fixture runs.
HUGGING_FACE = tempfile.TemporaryDirectory(prefix="llmkit-tests-")
os.environ |= {"HF_HOME": HUGGING_FACE.name, "HF_HUB_OFFLINE": "1"}

CHECKOUT = Path(__file__).parents[1]
KEYS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")


@pytest.fixture(scope="session", autouse=True)
def closed_world(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or writes the user's caches, reaches the network or finds a key; its children inherit that."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for key in KEYS:
            patch.delenv(key, raising=False)
        patch.setenv("LLMKIT_CACHE", str(home / "llmkit"))
        patch.setenv("WANDB_DIR", str(home))
        patch.setenv("WANDB_CONFIG_DIR", str(home / "wandb"))
        patch.setenv("WANDB_CACHE_DIR", str(home / "wandb"))
        patch.setenv("MPLCONFIGDIR", str(home / "matplotlib"))
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(closed_world: None) -> Path:
    """The directory of `model=tiny`, built once for all tests. Read only: copy it to change it."""
    from llmkit.model.tiny import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> Any:
    """The tokenizer of `model=tiny`, as a run has it."""
    from llmkit.config.schema import ModelConfig
    from llmkit.model.loading import load_tokenizer

    return load_tokenizer(ModelConfig(name="tiny", path=str(tiny_model_dir)), "keep-original")


@pytest.fixture
def chats_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes JSON Lines: a string is a line as it is, any other value is dumped.

    Without rows it writes eight chats about sums.
    """

    def write(*rows: Any, name: str = "chats.jsonl") -> Path:
        file = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows or sums(8)]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return file

    return write


def sums(count: int) -> list[dict[str, Any]]:
    """Chats of one question and one answer."""
    return [
        {"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"{2 * n}"}]}
        for n in range(count)
    ]


class SweepLauncher(Launcher):
    """Collects the configs of a sweep instead of running them."""

    composed: ClassVar[list[Any]] = []

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Any, initial_job_idx: int) -> list[Any]:
        self.composed.extend(self.loader.load_sweep_config(self.config, list(job)) for job in job_overrides)
        return []


@pytest.fixture
def compose() -> Callable[..., Any]:
    """A function: the words of a `train` command -> its resolved, validated config (of a sweep: a list of them)."""
    from llmkit.config import resolve, validate
    from llmkit.config.arguments import parse_arguments
    from llmkit.config.check import check_overrides
    from llmkit.config.compose import run_composed
    from llmkit.config.registration import register
    from llmkit.errors import ConfigError
    from llmkit.launchers.start import HYDRA_PLUGINS

    composed = SweepLauncher.composed

    def make(*words: str | Path) -> Any:
        composed.clear()
        arguments = parse_arguments(list(map(str, words)))
        if arguments.multirun or arguments.switches:
            run_composed("train", composed.append, arguments, HYDRA_PLUGINS | {"SweepLauncher": SweepLauncher})
        else:  # the same in half the time: hydra.main composes everything twice
            register()
            if problems := check_overrides(arguments.overrides, multirun=False):
                raise ConfigError(*problems)
            with hydra.initialize_config_module("llmkit.conf", version_base="1.3"):
                composed.append(hydra.compose("train", arguments.overrides))
        configs = [resolve(one) for one in composed]
        for config in configs:
            validate(config)
        return configs if arguments.multirun else configs[0]

    return make


RunLlmkit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_llmkit_in() -> RunLlmkit:
    """A function that runs `python -m llmkit ARGUMENTS` from this checkout in a directory."""

    def run(
        cwd: Path, *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "llmkit", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def run_llmkit(tmp_path: Path, run_llmkit_in: RunLlmkit) -> RunLlmkit:
    """The same, by default in the test's own directory."""

    def run(*arguments: str | Path, cwd: Path = tmp_path, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_llmkit_in(cwd, *arguments, **options)

    return run
