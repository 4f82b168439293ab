"""Parts of run directories, for the tests of the report."""

from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.config.launcher_schema import LocalLauncherConfig
from llmkit.config.schema import LoraConfig


def lora_config(r: int = 8, **values: Any) -> TrainConfig:
    """The config of a LoRA run."""
    return TrainConfig(lora=LoraConfig(r=r, lora_alpha=2 * r), launcher=LocalLauncherConfig(), **values)


def losses(*values: float, start: int = 1) -> list[dict[str, Any]]:
    """Records of training losses, one a step."""
    return [
        {"step": step, "epoch": step / 10, "loss": value, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 10 * step}
        for step, value in enumerate(values, start=start)
    ]


def write_sweep(directory: Path, *jobs: dict[str, Any], objective: str = "eval_loss") -> Path:
    """The record of a sweep whose jobs lie below `directory`; of each job what matters."""
    known = {"overrides": [], "status": "completed", "objective": None, "error": None}
    directory.mkdir(parents=True, exist_ok=True)
    rundir.write_json(directory / rundir.SWEEP, {"objective": objective, "jobs": [known | job for job in jobs]})
    return directory
