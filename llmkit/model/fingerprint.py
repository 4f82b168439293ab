"""Whether a model is the one it was, told without reading all of it."""

from hashlib import sha256
from pathlib import Path

from llmkit.config import TrainConfig
from llmkit.config.init_from import adapter_directory
from llmkit.model.source import model_source

ENDS = 1 << 20  # bytes read at either end of a file; safetensors begin with the names, types and places of all tensors


def start_fingerprint(config: TrainConfig) -> str:
    """What a run starts from: the base model, and the adapter that it continues. A hub model is known by its commit."""
    directories = [Path(model_source(config.model, weights=True))]
    if (adapter := adapter_directory(config)) is not None:
        directories.append(adapter)
    known = [config.model.commit or ""]
    return sha256("".join([*known, *(weights_fingerprint(path) for path in directories)]).encode()).hexdigest()


def weights_fingerprint(directory: Path) -> str:
    """A hash of the names, sizes and ends of all weight files below a directory; a copy of it has the same."""
    digest = sha256()
    for path in sorted(directory.rglob("*.safetensors"), key=lambda path: path.relative_to(directory).as_posix()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory).as_posix()}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            digest.update(file.read(ENDS))
    return digest.hexdigest()
