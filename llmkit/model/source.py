"""Where a model comes from (the hub, its cache, a directory, a bucket), and what to say when it cannot be had."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.config.schema import ModelConfig
from llmkit.errors import ConfigError
from llmkit.model.files import is_weights, model_files
from llmkit.remote import files_at, is_remote, local_copy


def model_source(config: ModelConfig, *, weights: bool = False) -> str:
    """What `from_pretrained` is given: a directory or a hub id. Builds the tiny model on first use.

    Of a model in a bucket it is the directory of a copy, without the weights unless they are asked for: what else there
    is to check should not wait for them.
    """
    if is_remote(config.path):
        assert config.path is not None
        return str(_copy(config.path, weights=weights))
    if config.path:
        return config.path
    if config.hub_id:
        return config.hub_id
    from llmkit.model.tiny import tiny_model

    return str(tiny_model())


def shown_source(config: ModelConfig) -> str:
    """The model's place as the config says it, for people and records: a copy's directory means nothing elsewhere."""
    return config.path if config.path and is_remote(config.path) else model_source(config)


def _copy(address: str, *, weights: bool) -> Path:
    there = files_at(address)
    try:
        names = model_files(there)
    except ConfigError as error:
        if not there:
            raise ConfigError(f"model.path={address}: there is nothing at this address in the bucket.") from error
        raise ConfigError(f"model.path={address}: {error}") from error
    return local_copy(address, names if weights else [name for name in names if not is_weights(name)])


def cached_commit(config: ModelConfig) -> str | None:
    """The commit that the hub model's revision stands for in the local cache, once its config has been loaded."""
    from huggingface_hub import try_to_load_from_cache

    if config.path or not config.hub_id:
        return None
    cached = try_to_load_from_cache(config.hub_id, "config.json", revision=config.commit or config.revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def hub_arguments(config: ModelConfig) -> dict[str, Any]:
    """The keywords that every `from_pretrained` of this model is given."""
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.hub_id and not config.path:
        arguments["revision"] = config.commit or config.revision
    return arguments


@contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Turn the libraries' errors about a model that cannot be had into one message."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model={config.name}: {_explanation(config, error)}") from error


def _explanation(config: ModelConfig, error: Exception) -> str:
    from huggingface_hub import errors

    source = config.path or config.hub_id
    causes = list(_chain(error))

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.RevisionNotFoundError):
        return f"{source} has no revision '{config.commit or config.revision}'; see model.revision."
    if caused_by(errors.GatedRepoError) or (config.gated and caused_by(errors.RepositoryNotFoundError)):
        return (
            f"{source} is gated: accept its licence at its page on the hub, then set HF_TOKEN (or run `hf auth login`)."
        )
    if caused_by(errors.RepositoryNotFoundError):
        return f"{source}: no such model on the hub, or a private one (then set HF_TOKEN)."
    if caused_by(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        token = " The model is gated: HF_TOKEN is needed too." if config.gated else ""
        return (
            f"{source} is not in the local cache and the hub cannot be reached. With a network: check HF_ENDPOINT "
            f"and HF_HUB_OFFLINE. Without: copy the model here and use model.path=DIR.{token}"
        )
    if "trust_remote_code" in str(error):
        return f"{source} comes with Python code of its own; model.trust_remote_code=true runs it, if you trust it."
    if "use_safetensors" in str(error):
        return f"{source} has no .safetensors; pickled weights can run code when loaded, so llmkit does not read them."
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{source} cannot be loaded: {first_line}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
