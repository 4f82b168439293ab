"""The floors of the house: imports go down only, and the light verbs stay light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmkit

PACKAGE = Path(llmkit.__file__).parent

# From the top floor to the ground. A module is on the floor of the longest name it begins with; a package's own
# __init__ counts like its modules.
FLOORS = [
    [
        *("llmkit", "llmkit.__main__", "llmkit.train", "llmkit.resume", "llmkit.preview", "llmkit.fetch"),
        *("llmkit.export", "llmkit.doctor", "llmkit.jobs", "llmkit.report", "llmkit.words", "llmkit.serve"),
        *("llmkit.chat", "llmkit.evaluate", "llmkit.answering"),
    ],
    [
        *("llmkit.launchers", "llmkit.reporting", "llmkit.worker", "llmkit.pack_worker", "llmkit.warm_worker"),
        *("llmkit.node", "llmkit.failure"),
    ],
    ["llmkit.recipes"],
    ["llmkit.training", "llmkit.serving"],
    ["llmkit.data", "llmkit.model"],
    [
        *("llmkit.config", "llmkit.rundir", "llmkit.errors", "llmkit.cli", "llmkit.processes", "llmkit.conf"),
        *("llmkit.durable", "llmkit.hangup", "llmkit.install_command", "llmkit.host_memory"),
        # Storage needs nothing of config but its own settings, and config asks it what an address holds.
        *("llmkit.storage", "llmkit.remote", "llmkit.byte_progress"),
    ],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
HEAVY = ("torch", "transformers", "trl", "peft", "wandb", "matplotlib", "datasets", "rich")


def modules() -> dict[str, Path]:
    """Every module of the four code folders by its name; recipes and launchers are links that rglob does not follow."""
    files = {file for folder in (PACKAGE, *PACKAGE.iterdir()) if folder.is_dir() for file in folder.rglob("*.py")}
    named = {}
    for file in files:
        words = ["llmkit", *file.relative_to(PACKAGE).with_suffix("").parts]
        named[".".join(words[:-1] if words[-1] == "__init__" else words)] = file
    return named


def imports(tree: ast.Module, module: str) -> Iterator[str]:
    """The modules of llmkit that a module's code names in its imports, at the top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "llmkit")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import by full name"
            if (node.module or "").partition(".")[0] == "llmkit":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name: str) -> int:
    """The floor of a module, or of a name inside one."""
    known = name
    while known not in FLOOR:
        known = known.rpartition(".")[0]
    # `from llmkit import __version__` is the package itself: below everything.
    return len(FLOORS) if known == "llmkit" else FLOOR[known]


MODULES = modules()


def test_every_module_has_a_floor():
    assert [name for name in MODULES if name != "llmkit" and floor(name) == len(FLOORS)] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_up(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    up = [f"{module} -> {name}" for name in imports(tree, module) if floor(name) < floor(module)]

    assert up == []


def test_an_arrow_that_goes_up_is_seen():
    tree = ast.parse("def f():\n    from llmkit.recipes import sft")

    assert list(imports(tree, "llmkit.data.reading.sources")) == ["llmkit.recipes.sft"]
    assert floor("llmkit.recipes.sft") < floor("llmkit.data.reading.sources")


@pytest.mark.parametrize(
    "words", [["train", "--help"], ["train", "--cfg", "job"], ["train", "lora.rank=4"], ["--help"]], ids=" ".join
)
def test_what_trains_nothing_imports_nothing_heavy(tmp_path, words):
    program = (
        "import sys\nfrom llmkit.cli import main\n"
        f"main({words!r})\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env(), capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


def env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PACKAGE.parent)}


def test_the_driver_of_a_run_imports_nothing_heavy(tmp_path):
    program = f"import llmkit.train, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env(), capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == []
