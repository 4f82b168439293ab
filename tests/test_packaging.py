"""llmkit runs from a wheel, an editable install and a bare checkout alike, from any working directory.

Each is made for real from a copy of the checkout, in an environment of its own that borrows the libraries of this one.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from email.parser import Parser
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmkit import __version__
from llmkit.rundir import read_result

CHECKOUT = Path(__file__).parents[1]
LINKED = ("conf", "recipes", "launchers")  # reach the package through symlinks in llmkit/
NO_NETWORK = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")


@dataclass(frozen=True, kw_only=True)
class Installed:
    """One way to have llmkit: how to call it, from where, and the directory it must then come from."""

    python: Path
    llmkit: list[str | Path]
    package: Path
    cwd: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str | Path) -> str:
        """Run a command in this installation; returns its stdout."""
        return run(*command, cwd=self.cwd, **self.env)


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command that must succeed, without this process's PYTHONPATH; returns its stdout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=inherited | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def checkout_files() -> list[str]:
    """The files of this checkout that git tracks, or would track."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=CHECKOUT)
    return sorted(name for name in set(listed.split("\0")) - {""} if (CHECKOUT / name).exists())


def copy_checkout(target: Path) -> Path:
    """A clean copy, as after `git clone`: building in it leaves nothing in this checkout."""
    for name in checkout_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, target / name, follow_symlinks=False)
    return target


def make_environment(directory: Path) -> Path:
    """A virtual environment with this one's libraries but without the llmkit that is installed here; its Python.

    An editable install is a .pth file, and Python reads those in an environment's own site-packages only.
    """
    venv.create(directory, symlinks=True)
    (site_packages(directory) / "borrowed.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    return directory / "bin" / "python"


def site_packages(environment: Path) -> Path:
    """Where packages lie in a virtual environment."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))


def pip_install(python: Path, *what: str | Path, cwd: Path) -> None:
    """Install into that environment, whatever the borrowed libraries hold."""
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--ignore-installed", *NO_NETWORK, *what, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip wheel` builds."""
    directory = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(directory / "source")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *NO_NETWORK, "--wheel-dir", directory, source, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


def from_wheel(directory: Path, wheel: Path) -> Installed:
    python = make_environment(directory / "venv")
    pip_install(python, wheel, cwd=directory)
    package = site_packages(directory / "venv") / "llmkit"
    return Installed(python=python, llmkit=[python.with_name("llmkit")], package=package, cwd=directory)


def editable(directory: Path, wheel: Path) -> Installed:
    python = make_environment(directory / "venv")
    source = copy_checkout(directory / "source")
    pip_install(python, "--editable", source, cwd=directory)
    return Installed(python=python, llmkit=[python.with_name("llmkit")], package=source / "llmkit", cwd=directory)


def checkout_on_the_path(directory: Path, wheel: Path) -> Installed:
    python = make_environment(directory / "venv")
    source = copy_checkout(directory / "source")
    env = {"PYTHONPATH": str(source)}
    return Installed(python=python, llmkit=[python, "-m", "llmkit"], package=source / "llmkit", cwd=directory, env=env)


def inside_the_checkout(directory: Path, wheel: Path) -> Installed:
    python = make_environment(directory / "venv")
    source = copy_checkout(directory / "source")
    return Installed(python=python, llmkit=[python, "-m", "llmkit"], package=source / "llmkit", cwd=source)


@pytest.fixture(
    scope="module",
    params=[from_wheel, editable, checkout_on_the_path, inside_the_checkout],
    ids=lambda way: way.__name__,
)
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """llmkit as a user has it, in each of the ways to have it."""
    way: Callable[[Path, Path], Installed] = request.param
    return way(tmp_path_factory.mktemp(way.__name__), wheel)


def test_the_wheel_holds_the_four_code_folders_as_one_package_and_nothing_else(wheel):
    expected = set()
    for name in checkout_files():
        folder = name.partition("/")[0]
        if folder == "llmkit" and not (CHECKOUT / name).is_symlink():
            expected.add(name)
        elif folder in LINKED:
            expected.add(f"llmkit/{name}")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert held == expected


@pytest.mark.parametrize(
    "name",
    [
        "llmkit/conf/train.yaml",
        "llmkit/conf/model/tiny.yaml",
        "llmkit/data/demo/train.jsonl",
        "llmkit/data/templates/chat-ml.jinja",
        "llmkit/recipes/sft.py",
        "llmkit/launchers/local.py",
    ],
)
def test_the_wheel_holds_files_and_not_links(wheel, name):
    source = CHECKOUT / name.removeprefix("llmkit/") if name.split("/")[1] in LINKED else CHECKOUT / name
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(name) == source.read_bytes()


def test_the_wheel_has_the_version_of_the_code_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())

    assert (fields["Name"], fields["Version"]) == ("llmkit", __version__)
    assert (fields["License-Expression"], fields["License-File"]) == ("Apache-2.0", "LICENSE")


def test_python_finds_the_package_where_it_was_put(installed):
    program = "import llmkit, llmkit.conf, llmkit.recipes, llmkit.launchers; print(llmkit.__file__)"

    assert installed.run(installed.python, "-c", program).strip() == str(installed.package / "__init__.py")


def test_the_command_says_its_version(installed):
    assert installed.run(*installed.llmkit, "--version").strip() == __version__


def test_the_config_is_found(installed):
    config = OmegaConf.create(installed.run(*installed.llmkit, "train", "lora.r=4", "--cfg", "job"))

    assert (config.model.name, config.lora.r) == ("tiny", 4)


def test_the_module_is_the_command(installed):
    help_of_module = installed.run(installed.python, "-m", "llmkit.train", "--help")

    assert "mistral7b" in help_of_module
    assert help_of_module == installed.run(*installed.llmkit, "train", "--help")


def test_the_worker_is_found_and_trains(installed, tmp_path):
    run_dir = tmp_path / "run"
    installed.run(*installed.llmkit, "train", f"run_dir={run_dir}", "training.max_steps=1", "evaluation=off")
    result = read_result(run_dir)

    assert result is not None
    assert (result["status"], result["steps"]) == ("completed", 1)
    assert (run_dir / "final" / "adapter_model.safetensors").is_file()
