"""`llmkit doctor` reports what is there, names the command for what is not, never crashes and keeps secrets."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from llmkit import doctor, install_command

OPTIONAL = ("bitsandbytes", "deepspeed", "vllm", "wandb")


@pytest.fixture(autouse=True)
def bare_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user with an empty home directory, logged in nowhere, in an empty working directory."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "NETRC", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "LLMKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run the doctor: its exit code, and each subject's mark and words."""
    code = doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[9:24].strip(): (line[:9].strip(), line[25:]) for line in lines}


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make Python behave as if these modules were not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_every_subject_gets_one_aligned_line_with_a_mark(capsys):
    _, lines = report(capsys)
    assert {mark for mark, _ in lines.values()} <= {doctor.OK, doctor.MISSING, doctor.NOTE}
    assert {"Python", "llmkit", "torch", "NVIDIA driver", "memory", "CPU", "disk for runs"} <= set(lines)
    assert {"disk for caches", "Hub login", "W&B", "vLLM", "DeepSpeed", "bitsandbytes", "transformers"} <= set(lines)
    assert all(words.strip() == words and words for _, words in lines.values())


def test_what_training_needs_and_is_there_means_exit_0(capsys):
    code, lines = report(capsys)
    assert code == 0
    assert [lines[name][0] for name in doctor.ESSENTIAL if name != "torch"] == [doctor.OK] * 4
    assert lines["torch"][0] in (doctor.OK, doctor.NOTE)  # a note where it cannot use the GPU


@pytest.mark.parametrize("module", doctor.ESSENTIAL)
def test_a_missing_package_that_training_needs_means_exit_1_and_names_the_command(monkeypatch, capsys, module):
    hide(monkeypatch, module)
    code, lines = report(capsys)
    assert code == 1
    assert lines[module][0] == doctor.MISSING
    assert lines[module][1].endswith(" demo")


def test_missing_optional_packages_are_named_with_their_commands_and_mean_exit_0(monkeypatch, capsys):
    hide(monkeypatch, *OPTIONAL)
    code, lines = report(capsys)
    assert code == 0
    commands = {subject: words.split()[-1] for subject, (mark, words) in lines.items() if mark == doctor.MISSING}
    assert commands == {"bitsandbytes": "demo", "DeepSpeed": "deepspeed", "vLLM": "serve-env", "W&B": "demo"}


def test_nothing_installed_at_all_is_reported_without_a_crash(monkeypatch, capsys):
    hide(monkeypatch, *doctor.ESSENTIAL, *OPTIONAL)
    code, lines = report(capsys)
    assert code == 1
    assert sum(mark == doctor.MISSING for mark, _ in lines.values()) == len(doctor.ESSENTIAL) + len(OPTIONAL)


def test_without_a_checkout_the_commands_are_pips(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(install_command, "__file__", str(tmp_path / "site-packages" / "llmkit" / "install_command.py"))
    hide(monkeypatch, "vllm", "trl")
    _, lines = report(capsys)
    assert lines["vLLM"][1].endswith(": pip install 'llmkit[serve]'")
    assert lines["trl"][1].endswith(": pip install llmkit")


def test_a_torch_that_does_not_import_is_reported_with_its_reason(monkeypatch, capsys, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open\\nmore words')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    code, lines = report(capsys)
    assert code == 1
    assert "(libcudart.so.13: cannot open)" in lines["torch"][1]


def test_no_heavy_package_but_torch_is_imported():
    script = (
        "import sys; from llmkit.doctor import main; main([]);"
        "sys.exit(' '.join({'vllm', 'transformers', 'trl', 'deepspeed', 'wandb'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_graphics_cards_are_reported_as_the_driver_names_them(monkeypatch, capsys, tmp_path):
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho '580.65.06, NVIDIA H100, 81559 MiB'\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    _, lines = report(capsys)
    assert lines["NVIDIA driver"] == (doctor.OK, "580.65.06, NVIDIA H100, 81559 MiB")


def test_logins_from_the_environment_are_seen_and_never_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    doctor.main([])
    shown = capsys.readouterr()
    assert "token in HF_TOKEN" in shown.out
    assert "key in WANDB_API_KEY" in shown.out
    assert "secret" not in shown.out + shown.err


def test_logins_from_files_are_seen_and_never_shown(capsys, bare_user):
    token = bare_user / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_secret\n")
    (bare_user / ".netrc").write_text("machine api.wandb.ai login user password wandb_secret\n")
    (bare_user / ".netrc").chmod(0o600)
    doctor.main([])
    shown = capsys.readouterr()
    assert f"token in {token}" in shown.out
    assert f"key in {bare_user / '.netrc'}" in shown.out
    assert "secret" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("host", "server", "found"),
    [
        ("api.wandb.ai", None, True),
        ("api.forge.coreweave.com", None, True),
        ("wandb.example.org:8080", "https://wandb.example.org:8080/", True),
        ("api.wandb.ai", "https://wandb.example.org", False),
    ],
)
def test_a_key_counts_for_the_server_it_is_for(bare_user, monkeypatch, host, server, found):
    from llmkit.training.wandb_key import wandb_key_place

    (bare_user / ".netrc").write_text(f"machine {host} login user password wandb_secret\n")
    (bare_user / ".netrc").chmod(0o600)
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert wandb_key_place() == (str(bare_user / ".netrc") if found else None)


@pytest.mark.parametrize("content", ["", "machine api.wandb.ai login"])
def test_a_user_without_logins_gets_notes_even_if_the_files_are_broken(capsys, bare_user, content):
    (bare_user / ".netrc").write_text(content)
    code, lines = report(capsys)
    assert code == 0
    assert lines["Hub login"][0] == lines["W&B"][0] == doctor.NOTE


def test_offline_modes_are_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, lines = report(capsys)
    assert lines["Hub login"][1].endswith("HF_HUB_OFFLINE is set")
    assert lines["W&B"][1].endswith("offline (WANDB_MODE)")


def test_little_disk_is_a_note_and_directories_that_do_not_exist_yet_are_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no" / "such" / "place"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 3 * 2**30))
    _, lines = report(capsys)
    assert lines["disk for models"][0] == doctor.NOTE
    assert lines["disk for models"][1].startswith(f"3 GiB free in {tmp_path}/no/such/place/hub;")


def test_an_unknown_argument_is_refused_with_exit_2(capsys):
    assert doctor.main(["--gpu"]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_help_is_short_and_exits_0(capsys):
    assert doctor.main(["--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 12
