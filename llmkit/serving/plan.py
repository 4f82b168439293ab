"""What vLLM is started with: the command line and the environment that follow from a target and `serve.*`."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config.schema import ModelConfig, ServeConfig, TrainConfig
from llmkit.errors import ConfigError
from llmkit.model.source import model_source
from llmkit.serving.environment import Environment
from llmkit.serving.servable import lora_arguments
from llmkit.serving.target import Target, dtype_of

MODULE = "vllm.entrypoints.openai.api_server"  # where older versions of vLLM have it too
IMAGE = "vllm/vllm-openai"
MIDDLEWARE = "llmkit_allow_list.AllowList"
MIDDLEWARE_DIR = Path(__file__).parent / "in_vllm"
KEY = "VLLM_API_KEY"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A server to be started: what it serves and how."""

    targets: dict[str, Target]  # by the names requests ask for them
    base: str  # a directory or a hub id: what `--model` is given
    measured: str  # whose config and weights say what it takes: `base`, or of what is still to be merged its own base
    measured_model: ModelConfig
    revision: str | None  # of a hub id
    adapters: dict[str, Target]  # those of `targets` that are served beside the base
    dtype: str  # by vLLM's name
    serve: ServeConfig
    environment: Environment
    trust_remote_code: bool
    names_modules: bool = True  # whether vLLM is told which modules adapters change

    @property
    def names(self) -> list[str]:
        return list(self.targets)

    @property
    def needs_key(self) -> bool:
        """Whether requests need the key of the environment."""
        return bool(os.environ.get(KEY))

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.serve.host, self.serve.host)
        return f"http://{host}:{self.serve.port}"

    def arguments(self) -> list[str]:
        """The words that follow `vllm serve`; no secret is among them."""
        serve = self.serve
        words = ["--model", self.base, "--host", serve.host, "--port", str(serve.port)]
        if self.revision:
            words += ["--revision", self.revision]
        words += ["--served-model-name", *([self._base_name()] if self.adapters else self.names)]
        words += [*self._rendering(), "--dtype", self.dtype, "--load-format", serve.load_format]
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "quantization"):
            if (value := getattr(serve, name)) is not None:
                words += [_flag(name), str(value)]
        for name in ("enforce_eager", "enable_prefix_caching"):
            if (value := getattr(serve, name)) is not None:
                words.append(_flag(name) if value else _flag(f"no_{name}"))
        if serve.max_model_len is None:
            words += ["--max-model-len", "auto"]  # the model's context, or what the memory holds of it
        words += ["--tensor-parallel-size", str(serve.tensor_parallel_size)]
        words += ["--pipeline-parallel-size", str(serve.pipeline_parallel_size)]
        words += ["--gpu-memory-utilization", str(serve.gpu_memory_utilization)]
        if serve.kv_cache_gib is not None:
            words += ["--kv-cache-memory-bytes", str(round(serve.kv_cache_gib * 2**30))]
        if self.adapters:
            words += lora_arguments(self.adapters, name_modules=self.names_modules)
        words += ["--shutdown-timeout", str(serve.shutdown_timeout), "--disable-fastapi-docs"]
        words += ["--trust-remote-code"] * self.trust_remote_code
        return words + list(serve.extra_args)

    def _rendering(self) -> list[str]:
        """The template and end tokens that were trained with, which an adapter's base does not have.

        Its vocabulary it does have: an adapter with tokens of its own is merged before it is served.
        """
        first = next(iter(self.targets.values()))
        words = ["--tokenizer", self.serve.tokenizer] if self.serve.tokenizer else []
        folder = Path(first.source)
        template = folder / "chat_template.jinja"
        if self.adapters and template.is_file():
            words += ["--chat-template", str(template)]
        elif self.adapters and (text := _template_within(folder)):
            words += ["--chat-template", text]
        if self.adapters and (folder / "generation_config.json").is_file():
            words += ["--generation-config", first.source]
        return words

    def _base_name(self) -> str:
        """What requests call the base beside its adapters."""
        model = next(iter(self.targets.values())).base
        name = model.name if model.name != "custom" else (model.hub_id or self.base).rstrip("/").rpartition("/")[2]
        return f"{name}-base" if name in self.adapters else name

    def command(self) -> list[str]:
        """The whole command line, the guard of the routes included."""
        return [self.environment.python, "-m", MODULE, *self.arguments(), "--middleware", MIDDLEWARE]

    def variables(self) -> dict[str, str]:
        """What the environment of the server has beside this one's; nothing secret."""
        path = os.pathsep.join(filter(None, [str(MIDDLEWARE_DIR), os.environ.get("PYTHONPATH", "")]))
        variables = {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.serve.devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = str(self.serve.devices)
        return variables

    def in_container(self) -> str:
        """A command that serves the same from vLLM's own image; the directories are mounted where they are here."""
        folders = [self.base, *(target.source for target in self.targets.values()), self.serve.tokenizer or ""]
        mounts = dict.fromkeys(str(Path(folder).absolute()) for folder in folders if Path(folder).is_dir() and folder)
        hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        words = ["docker", "run", "--rm", "--gpus", _gpus(self.serve), "--ipc", "host"]
        words += ["-v", f"{hub}:/root/.cache/huggingface"] if not Path(self.base).is_absolute() else []
        words += ["--network", "host", "-e", KEY, "-e", "HF_TOKEN", "-e", "PYTHONPATH=/llmkit"]
        words += ["-v", f"{MIDDLEWARE_DIR}:/llmkit:ro", *(word for m in mounts for word in ("-v", f"{m}:{m}:ro"))]
        words += [
            f"{IMAGE}:v{self.environment.version.partition('+')[0]}",
            *_absolute(self.arguments()),
            "--middleware",
            MIDDLEWARE,
        ]
        return shlex.join(words)


def make_plan(targets: dict[str, Target], config: TrainConfig, environment: Environment) -> Plan:
    """The server for these targets, which share a base if they are several.

    Args:
        targets: whole models, or adapters that vLLM serves; by the names they are asked for under.

    Raises:
        ConfigError: if they cannot be served together.
    """
    adapters = {name: target for name, target in targets.items() if not target.is_whole}
    first = next(iter(targets.values()))
    if len(targets) > 1:
        _check_one_base(targets)
    model = first.base
    base = model_source(model, weights=True)
    measured = model
    if model.path and not Path(base).is_dir() and first.run is not None:  # dry_run: not merged yet
        measured = first.run.model
    on_hub = bool(model.hub_id) and not model.path
    revision = model.commit or model.revision if on_hub else None
    precision = _trained_in(first) if config.serve.dtype == "auto" else config.serve.dtype
    return Plan(
        targets=targets,
        base=base if on_hub else str(Path(base).absolute()),
        revision=revision if revision != "main" else None,
        measured=model_source(measured),
        measured_model=measured,
        adapters=adapters,
        dtype="auto" if precision == "auto" else dtype_of(precision),
        serve=config.serve,
        environment=environment,
        trust_remote_code=model.trust_remote_code,
    )


def _trained_in(target: Target) -> str:
    """The precision of the run that made it; where there is none, or it is left open, the files say (vLLM's `auto`)."""
    return target.run.precision.name if target.run else "auto"


def _check_one_base(targets: dict[str, Target]) -> None:
    """Raise ConfigError unless all are adapters that can stand beside one base, rendered and computed alike."""
    first_name, first = next(iter(targets.items()))
    for name, target in targets.items():
        if target.is_whole:
            raise ConfigError(f"serve.all=true: {name} is a whole model, and one server has one; serve it alone, run=.")
        if _identity(target.base) != _identity(first.base):
            raise ConfigError(f"serve.all=true: {name} and {first_name} have different bases; serve them one by one.")
        if _template(target) != _template(first):
            raise ConfigError(
                f"serve.all=true: {name} and {first_name} have different chat templates, and vLLM renders with one; "
                "serve them one by one."
            )
        if _trained_in(target) != _trained_in(first) or _endings(target) != _endings(first):
            raise ConfigError(
                f"serve.all=true: {name} and {first_name} have different precisions or end tokens, and a server has "
                "one; serve them one by one."
            )


def _endings(target: Target) -> Any:
    """The tokens that end an answer."""
    return (rundir.read_json(Path(target.source, "generation_config.json")) or {}).get("eos_token_id")


def _template_within(folder: Path) -> str | None:
    """The template in tokenizer_config.json, where older versions of Transformers wrote it."""
    own = (rundir.read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    return own if isinstance(own, str) else None


def _identity(model: ModelConfig) -> tuple[str | None, ...]:
    return (model.path,) if model.path else (model.hub_id, model.commit or model.revision, model.name)


def _template(target: Target) -> str | None:
    file = Path(target.source, "chat_template.jinja")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _gpus(serve: ServeConfig) -> str:
    return "all" if serve.devices is None else f'"device={serve.devices}"'


def _absolute(words: list[str]) -> list[str]:
    """Paths as the container sees them: it has another working directory."""
    return [str(Path(word).absolute()) if "/" in word and Path(word).is_dir() else word for word in words]
