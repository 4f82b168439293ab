"""Tasks of lm-evaluation-harness, asked of an endpoint through its own OpenAI-compatible backends.

It runs as a process of its own, as its command line is documented; nothing of it is imported.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from llmkit.errors import ConfigError, LlmkitError
from llmkit.install_command import install_command
from llmkit.serving.endpoint import KEYS, RETRIES, Endpoint
from llmkit.serving.target import Target
from llmkit.training.estimate import Estimate, Z, share

BACKENDS = {True: ("local-chat-completions", "chat/completions"), False: ("local-completions", "completions")}
SHARES = ("acc", "acc_norm", "exact_match")  # metrics that are means of zeros and ones
STDERR = 2  # its words are not our results


def check_installed() -> None:
    """Raise ConfigError, with the command that installs it, if the harness is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"tasks: need lm-evaluation-harness, which is not installed here: {install_command('eval', extra='eval')} "
            "adds it."
        )


def run_tasks(
    tasks: list[str],
    endpoint: Endpoint,
    target: Target,
    *,
    chat: bool,
    limit: int | None,
    max_new_tokens: int | None,
) -> dict[str, Estimate]:
    """Have the harness ask `endpoint`; returns its figures by `TASK METRIC`.

    Args:
        tasks: their names, or YAML files of your own.
        chat: through chat completions, which generate; else through completions, which give likelihoods too.
        limit: the first so many questions of each task.
        max_new_tokens: longest answer; unset: as the task says.

    Raises:
        ConfigError: if it is not installed.
        LlmkitError: if it fails.
    """
    check_installed()
    with tempfile.TemporaryDirectory(prefix="llmkit-tasks-") as folder:
        config, results = Path(folder, "config.yaml"), Path(folder, "results")
        settings = _settings(tasks, endpoint, target, chat=chat, limit=limit, max_new_tokens=max_new_tokens)
        config.write_text(yaml.safe_dump(settings | {"output_path": str(results)}), encoding="utf-8")
        command = [sys.executable, "-m", "lm_eval", "run", "--config", str(config)]
        done = subprocess.run(command, env=_environment(), stdout=STDERR)
        if done.returncode:
            raise LlmkitError(f"lm-evaluation-harness failed with exit code {done.returncode}; its words are above.")
        (written,) = results.rglob("results_*.json")
        return _figures(json.loads(written.read_text(encoding="utf-8")))


def _settings(
    tasks: list[str],
    endpoint: Endpoint,
    target: Target,
    *,
    chat: bool,
    limit: int | None,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """The harness's own config; unset values are left to it."""
    backend, path = BACKENDS[chat]
    model: dict[str, Any] = {
        "model": endpoint.model,
        "base_url": f"{endpoint.url}/{path}",
        "num_concurrent": endpoint.concurrency,
        "max_retries": RETRIES,
    }
    if not chat:  # likelihoods are of tokens, which it has to count itself
        model |= {"tokenizer_backend": "huggingface", "tokenizer": target.source}
    settings: dict[str, Any] = {"model": backend, "model_args": model, "tasks": tasks, "apply_chat_template": True}
    if limit is not None:
        settings["limit"] = limit
    if max_new_tokens is not None:
        settings["gen_kwargs"] = {"max_gen_toks": max_new_tokens}
    return settings


def _environment() -> dict[str, str]:
    """Its own backend looks for a key under one name."""
    key = next((value for name in KEYS if (value := os.environ.get(name))), "none")
    return os.environ | {"OPENAI_API_KEY": key}


def _figures(results: dict[str, Any]) -> dict[str, Estimate]:
    """Its results by `TASK METRIC`; it calls them `acc,FILTER`, and their standard errors `acc_stderr,FILTER`."""
    figures = {}
    for task, found in results["results"].items():
        n = results["n-samples"].get(task, {}).get("effective", 0)
        for key, value in found.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task} {metric}" + (f" ({chosen})" if chosen != "none" else "")
            figures[name] = _estimate(metric, value, found.get(f"{metric}_stderr,{chosen}"), n)
    return figures


def _estimate(metric: str, value: float, error: Any, n: int) -> Estimate:
    if metric in SHARES and n and math.isclose(hits := round(value * n), value * n, abs_tol=1e-6):
        return share(hits, n)
    if not isinstance(error, int | float):
        return Estimate(value=value, low=None, high=None, n=n)
    return Estimate(value=value, low=value - Z * error, high=value + Z * error, n=n)
