"""`init_from=DIR`: start from the weights of a finished run, or of a directory that is itself a model or an adapter.

    llmkit train recipe=dpo init_from=runs/sft data.path=pairs.jsonl

A full model is loaded as it is. An adapter is continued as it is, on the base it was made for. Either brings its
tokenizer and chat template. This only reads JSON and YAML, also of a run in a bucket (`init_from=s3://...`): the driver
answers before anything heavy is loaded.
`resume` is another word: it goes on with a run that was interrupted; `init_from` begins a new one.
"""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config.files import load
from llmkit.config.schema import LoraConfig, ModelConfig, TrainConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.remote import files_at, is_remote, joined, local_copy, split_address

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
DEFAULT_MODEL = "tiny"  # conf/train.yaml's
ADAPTER_METHODS = ("lora", "qlora")
QUOTED = re.compile(r"'((?:\\'|[^'])*)'|\"([^\"]*)\"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run starts."""

    directory: Path  # a run's final/, or the directory given; of one in a bucket a copy, of its settings alone
    place: str  # what is loaded: the directory's absolute path, or its address in a bucket
    adapter: dict[str, Any] | None  # its adapter_config.json; None for a full model
    run: TrainConfig | None  # the config of the run that made it, where llmkit did

    @property
    def model(self) -> ModelConfig:
        """The model to load: the full model itself, or the adapter's base."""
        told = self.run.model if self.run else ModelConfig()
        # Its template and padding come with its tokenizer; code of a model's own runs only where this run trusts it.
        told = dataclasses.replace(told, chat_template="keep-original", pad_token="auto", trust_remote_code=False)
        if self.adapter is None:
            return dataclasses.replace(told, path=self.place, hub_id=None, revision="main", commit=None)
        if self.run:
            return told
        base = self.adapter.get("base_model_name_or_path")
        if not base:
            raise ConfigError(f"{self.directory / ADAPTER_CONFIG} names no base model (base_model_name_or_path).")
        if is_remote(base) or Path(base).is_dir():
            return dataclasses.replace(told, path=_absolute(base))
        return dataclasses.replace(told, hub_id=base, revision=self.adapter.get("revision") or "main")


def find_start(init_from: str) -> Start:
    """What `init_from` names.

    Raises ConfigError if that is not a finished run, a model or an adapter, StorageError if a bucket does not answer.
    """
    said = f"init_from={init_from}"
    place = _root(init_from)
    directory = _settings_of(place, said) if is_remote(place) else Path(place)
    if not directory.is_dir():
        siblings = directory.parent.iterdir() if directory.parent.is_dir() else ()
        near = did_you_mean(directory.name, [path.name for path in siblings])
        raise ConfigError(f"{said}: there is no such directory (seen from {Path.cwd()}).{near}")
    if (directory / rundir.SWEEP).exists():
        jobs = (rundir.read_json(directory / rundir.SWEEP) or {}).get("jobs", [])
        runs = ", ".join(str(job.get("run_dir")) for job in jobs if job.get("status") == "completed")
        raise ConfigError(f"{said}: holds a sweep; choose one of its runs: {runs or 'none is finished'}.")
    run = None
    if (directory / rundir.CONFIG).exists():
        result = rundir.read_result(directory) or {}
        if result.get("status") != "completed":
            raise ConfigError(
                f"{said}: this run is not finished (its status: {result.get('status') or 'unfinished'}); start its own "
                "command again to finish it first."
            )
        run, directory, place = load(directory), directory / rundir.FINAL, joined(place, rundir.FINAL)
        if not directory.is_dir():
            raise ConfigError(f"{said}: this run has no {rundir.FINAL}/: its weights are not there any more.")
    adapter = rundir.read_json(directory / ADAPTER_CONFIG)
    if adapter is None and not (directory / MODEL_CONFIG).is_file():
        raise _neither(said)
    return Start(directory=directory, place=place, adapter=adapter, run=run)


def _root(init_from: str) -> str:
    """The run's directory, where its final/ is given; absolute."""
    place = _absolute(init_from.rstrip("/"))
    above, name = split_address(place) if is_remote(place) else os.path.split(place)
    if name != rundir.FINAL:
        return place
    is_run = rundir.CONFIG in files_at(above) if is_remote(above) else Path(above, rundir.CONFIG).exists()
    return above if is_run else place


def _settings_of(address: str, said: str) -> Path:
    """A copy of the small files that say what a directory in a bucket holds. Raises ConfigError if there is none."""
    there = files_at(address)
    if not there:
        raise ConfigError(f"{said}: there is nothing at this address in the bucket.")
    small = [rundir.CONFIG, rundir.RESULT, rundir.SWEEP]
    small += [f"{folder}{name}" for folder in ("", f"{rundir.FINAL}/") for name in (ADAPTER_CONFIG, MODEL_CONFIG)]
    if names := there.keys() & set(small):
        return local_copy(address, names)
    raise _neither(said)


def _neither(said: str) -> ConfigError:
    return ConfigError(
        f"{said}: neither a run directory ({rundir.CONFIG}), nor a model ({MODEL_CONFIG}), nor an adapter "
        f"({ADAPTER_CONFIG})."
    )


def _absolute(place: str) -> str:
    return place if is_remote(place) else str(Path(place).absolute())


def adapter_directory(config: TrainConfig) -> Path | None:
    """The directory of the adapter that this run continues; None if it starts from a full model."""
    start = find_start(config.init_from) if config.init_from else None
    if start is None or start.adapter is None:
        return None
    return local_copy(start.place) if is_remote(start.place) else start.directory


def implied_model(override: str) -> str | None:
    """The option of the model group that goes with a value of `init_from` in Hydra's grammar, where no model is chosen.

    Options set more than the model (tiny: a learning rate), so the right one must be composed. None where the values of
    a sweep want several, and for wrong values: `adopt_init_from` explains those.
    """
    from llmkit.config.registration import group_options

    names = set()
    for single, double in QUOTED.findall(override):
        try:
            run = find_start(single.replace("\\'", "'") or double).run
        except ConfigError:
            return None
        name = run.model.name if run else "custom"
        names.add(name if name in group_options("model") else "custom")
    return names.pop() if len(names) == 1 else None


def adopt_init_from(config: TrainConfig) -> None:
    """Complete `config`, in place, with what follows from `init_from`: the model, and the shape of a continued adapter.

    Raises ConfigError for what cannot be started from, and for settings that contradict it.
    """
    if not config.init_from:
        return
    start = find_start(config.init_from)
    problems = [*_method_problems(config, start), *_model_problems(config, start)]
    if start.adapter is not None and isinstance(config.lora, LoraConfig):
        problems += _adopt_adapter(config, start)
    if problems:
        raise ConfigError(*problems)
    config.init_from = _absolute(config.init_from)
    ours = config.model
    config.model = dataclasses.replace(
        start.model,
        attn_implementation=ours.attn_implementation,
        trust_remote_code=ours.trust_remote_code,
        pad_token=ours.pad_token,
    )
    if start.run:
        config.data.chat_template_kwargs = start.run.data.chat_template_kwargs | config.data.chat_template_kwargs


def _method_problems(config: TrainConfig, start: Start) -> list[str]:
    method = config.method.name
    if start.adapter is None:
        return []
    if (kind := start.adapter.get("peft_type")) != "LORA":
        return [f"init_from={config.init_from}: an adapter of the kind {kind}; llmkit continues LORA."]
    if method in ADAPTER_METHODS:
        return []
    return [
        f"init_from={config.init_from} method={method}: this is an adapter. Continue it with method=lora or qlora; or "
        "merge it into its base first (its README.md says how) and start from that, with init_from=MERGED."
    ]


def _model_problems(config: TrainConfig, start: Start) -> list[str]:
    wanted, chosen = start.model, config.model
    if not (chosen.path or chosen.hub_id):
        if chosen.name in (wanted.name, "custom"):
            return []
        if chosen.name == DEFAULT_MODEL:  # reached only where no option could be implied: a sweep over unlike models
            return [f"init_from={config.init_from}: say its model too, model={wanted.name}."]
    fitting = [_identity(wanted), *([_identity(start.run.model)] if start.run else [])]
    if _identity(chosen) in fitting:
        return []
    made_from = "is" if start.adapter is None else "was made for"
    return [
        f"model={chosen.name} ({_words(chosen)}): init_from={config.init_from} {made_from} "
        f"{_words(start.run.model if start.run else wanted)}; leave model out, and it is used."
    ]


def _identity(model: ModelConfig) -> tuple[str, ...]:
    if model.path:
        return ("path", model.path.rstrip("/") if is_remote(model.path) else str(Path(model.path).resolve()))
    if model.hub_id:
        return ("hub", model.hub_id, model.revision)
    return ("name", model.name)


def _words(model: ModelConfig) -> str:
    if model.hub_id and not model.path:
        return model.hub_id + (f" at {model.revision}" if model.revision != "main" else "")
    return model.path or model.name


def _adopt_adapter(config: TrainConfig, start: Start) -> list[str]:
    """Take over the shape of the adapter where `lora.*` is at its default; the differences elsewhere."""
    assert start.adapter is not None
    found, default = [], LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        key = field.name
        theirs, ours = start.adapter.get(key, getattr(default, key)), getattr(config.lora, key)
        if _comparable(ours) == _comparable(theirs):
            continue
        if ours == getattr(default, key) or f"lora.{key}" in config.derived:
            setattr(config.lora, key, sorted(theirs) if isinstance(theirs, list) else theirs)
        else:
            found.append(f"lora.{key}={ours} (it has {theirs})")
    if not found:
        return []
    return [
        f"{', '.join(found)}: an adapter is continued as it is. Leave these out, or merge it into its base first (its "
        f"README.md says how) and give the merged model a new adapter. init_from={config.init_from}."
    ]


def _comparable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list | tuple) else value or None
