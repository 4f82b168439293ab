"""Look at data and tokenizers as a run does, without loading what only a run needs."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llmkit
from llmkit.config import TrainConfig
from llmkit.worker import hide_unused_libraries


@contextmanager
def light_imports(config: TrainConfig) -> Iterator[None]:
    """Imports without what looking at data does not use, torch above all: two of three seconds."""
    without_torch = _is_own_process() and not config.model.trust_remote_code  # a model's own code may want it
    if _is_own_process():
        hide_unused_libraries(config)
    if without_torch:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that it is not found
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    collects = gc.isenabled()
    gc.disable()  # it would walk what imports make, again and again
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if without_torch and sys.modules["torch"] is None:
            del sys.modules["torch"]  # Datasets takes a name that is there for a module that is there (5.2)


def _is_own_process() -> bool:
    """Whether this process is the command and nothing else, so that nobody misses what is hidden in it."""
    program = Path(sys.argv[0])
    return program.name == "llmkit" or program.parent == Path(llmkit.__file__).parent
