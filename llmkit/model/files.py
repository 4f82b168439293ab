"""Which files of a model are worth having: its weights once, in safetensors, and all that is small beside them."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from llmkit.errors import ConfigError

SAFETENSORS = ".safetensors"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights of other libraries, or pickled ones, which can run code when they are loaded.
OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".gguf",
    ".ggml",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".tflite",
    ".ot",
    ".npz",
    ".mlmodel",
    ".nemo",
    ".engine",
)
PICKLED = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt")
# Directories and files that hold the same weights once more, as their makers or other programs want them.
DUPLICATES = ("original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*", "metal/*", "consolidated*", "*.index.json")
NEVER = (".git*", "*/.git*", "manifest.json", ".cache/*")


def model_files(names: Iterable[str], *, allow: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[str]:
    """Those of the files of a model's directory or repository that loading it takes, sorted.

    Args:
        allow: shell patterns; if there are any, only files that match one are taken (`*` stands for slashes too).
        ignore: shell patterns of files that are not taken.

    Raises:
        ConfigError: the weights are not there as safetensors.
    """
    there = sorted(names)
    weights = _weights(there)
    if not weights:
        raise ConfigError(f"has {_weights_in_words(there)}")
    taken = [name for name in there if name in weights or _is_small(name)]
    if INDEX in there and WHOLE not in weights:
        taken = sorted({*taken, INDEX})
    return [name for name in taken if (not allow or _matches(name, allow)) and not _matches(name, ignore)]


def is_weights(name: str) -> bool:
    """Whether a file holds weights, in any form."""
    return name.endswith((SAFETENSORS, *OTHER_WEIGHTS))


def _weights(names: Sequence[str]) -> set[str]:
    """The safetensors that `from_pretrained` reads: an adapter's, one whole file, or else the parts."""
    files = [
        name for name in names if name.endswith(SAFETENSORS) and "/" not in name and not _matches(name, DUPLICATES)
    ]
    parts = {name for name in files if fnmatchcase(name, "model-?????-of-?????.safetensors")}
    variants = {name for name in files if fnmatchcase(name, "model.*.safetensors")}  # model.fp16.safetensors
    kept = set(files) - variants
    return kept - parts if WHOLE in kept else kept


def _is_small(name: str) -> bool:
    return not is_weights(name) and not _matches(name, (*DUPLICATES, *NEVER))


def _weights_in_words(names: Sequence[str]) -> str:
    pickled = [name for name in names if _matches(PurePosixPath(name).name, PICKLED)]
    if pickled:
        return (
            f"{pickled[0]} but no .safetensors; pickled weights can run code when loaded, so llmkit takes safetensors "
            "only. Convert it with save_pretrained, or look for another revision that has them."
        )
    other = next((name for name in names if is_weights(name)), None)
    return f"no weights that Transformers loads (*.safetensors){f', but {other}' if other else ''}."


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
