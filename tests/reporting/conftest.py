"""What the tests of the report look at: a real sweep, made once, and directories as runs under way leave them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import lora_config

from llmkit import rundir
from llmkit.config import TrainConfig, save

STEPS = 6
SWEEP = (
    *("train", "name=ranks", "-m", "lora.r=2,4", "training.learning_rate=1e-3,2e-2", f"training.max_steps={STEPS}"),
    *("training.logging_steps=1", "training.eval_steps=3", "evaluation.examples=16", "hardware.price_per_hour=3.6"),
    *("data.test=demo", "training.warmup_steps=1"),
)


@pytest.fixture(scope="session")
def workplace(run_llmkit_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose runs/ranks is a finished sweep of four runs. Read only."""
    directory = tmp_path_factory.mktemp("reported")
    done = run_llmkit_in(directory, *SWEEP)
    assert done.returncode == 0, done.stdout + done.stderr
    (directory / "said.txt").write_text(done.stdout)
    return directory


@pytest.fixture(scope="session")
def ranks(workplace: Path) -> Path:
    """The directory of that sweep."""
    return workplace / "runs" / "ranks"


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a run directory: its config, and what else is given."""

    def make(
        name: str,
        *,
        config: TrainConfig | None = None,
        records: list[dict[str, Any]] | None = None,
        samples: list[dict[str, Any]] | None = None,
        **result: Any,
    ) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True)
        save(config or lora_config(), run_dir)
        for file, lines in ((rundir.METRICS, records), (rundir.SAMPLES, samples)):
            if lines is not None:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                (run_dir / file).write_text(text, encoding="utf-8")
        if result:
            rundir.write_result(run_dir, **result)
        return run_dir

    return make
