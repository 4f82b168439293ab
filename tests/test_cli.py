"""The `llmkit` command: its verbs, its help, its completion; and every verb can be called twice in one process."""

import logging
import os
import shlex
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from llmkit import __version__, cli, train
from llmkit.config.arguments import parse_arguments
from llmkit.config.check import check_overrides
from llmkit.config.registration import group_names, group_options
from llmkit.launchers.start import SweepLauncher


@pytest.fixture
def shim(tmp_path, monkeypatch):
    """`llmkit-train` on the PATH, as an installed package has it, running this checkout."""
    program = "import sys; sys.argv[0] = 'llmkit-train'; from llmkit.train import main; sys.exit(main())"
    script = tmp_path / "bin" / "llmkit-train"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(program)} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(cli.__file__)))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    return script


@pytest.fixture
def own_logging():
    """Hydra's answers about itself turn its debug log on, to an output that ends with the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def complete(monkeypatch, capsys, line: str) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert train.main(["-sc", "query=bash"]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_llmkit_alone_lists_its_verbs(capsys, words):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for verb, purpose in cli.VERBS.items():
        assert verb in out
        assert purpose in out


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["trian", "lora.r=4"]) == 2
    err = capsys.readouterr().err
    assert "trian" in err
    assert "Did you mean 'train'?" in err


def test_the_help_of_train_is_short(capsys):
    assert train.main(["--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 45


@pytest.mark.parametrize("group", group_names())
def test_the_help_of_train_lists_every_group_with_its_options(capsys, group):
    train.main(["--help"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  {group} "))

    assert [word.strip(",") for word in line.split()[1:]] == list(group_options(group))


def example_commands() -> list[list[str]]:
    """The words of each example in the help, up to its explanation."""
    commands = []
    for line in train.HELP.splitlines():
        if line.startswith("  llmkit train"):
            words = shlex.split(line)[2:]
            typed = [word for word in words if "=" in word or word.startswith("-") or word.endswith(".yaml")]
            assert words[: len(typed)] == typed, "an override after the explanation has begun"
            commands.append(typed)
    return commands


def test_the_help_of_train_has_six_examples():
    assert len(example_commands()) == 6


@pytest.mark.parametrize("words", example_commands(), ids=" ".join)
def test_the_examples_of_the_help_are_commands_that_work(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.endswith(".yaml"):
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).write_text("seed: 1\n")
    arguments = parse_arguments(words)

    assert check_overrides(arguments.overrides, multirun=arguments.multirun) == []


def test_cfg_job_prints_the_config_as_yaml_and_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert train.main(["method=qlora", "lora.r=4", "--cfg", "job"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.method.name, printed.lora.r, printed.qlora.bits) == ("qlora", 4, 4)
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_may_be_written_with_an_equals_sign(capsys):
    assert train.main(["--cfg=job", "seed=7"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).seed == 7


def test_a_verb_can_be_called_again_in_the_same_process(capsys):
    printed = []
    for rank in (4, 8):
        assert train.main([f"lora.r={rank}", "--cfg", "job"]) == 0
        printed.append(OmegaConf.create(capsys.readouterr().out).lora.r)

    assert printed == [4, 8]


def test_a_verb_can_be_called_again_after_a_wrong_call(capsys):
    assert train.main(["hydra/launcher=nonsense", "--cfg", "job"]) == 2
    assert train.main(["--cfg", "job"]) == 0


def test_the_outcome_of_an_earlier_sweep_is_not_that_of_this_call(monkeypatch):
    class FailedSweep:
        def exit_code(self) -> int:
            return 1

    monkeypatch.setattr(SweepLauncher, "sweep", FailedSweep())

    assert train.main(["--cfg", "job"]) == 0


def test_the_command_line_of_the_process_is_left_as_it_was():
    before = list(sys.argv)
    train.main(["--cfg", "job"])

    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.usefixtures("own_logging")
def test_hydras_own_help_stays(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--hydra-help"])
    assert ended.value.code == 0
    assert "--multirun" in capsys.readouterr().out


@pytest.mark.usefixtures("own_logging")
def test_info_shows_where_the_config_comes_from(capsys):
    train.main(["--info", "searchpath"])

    assert "pkg://llmkit.conf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("llmkit-train meth", ["method=", "method."]),
        ("llmkit-train method=", ["method=freeze", "method=full", "method=lora", "method=qlora"]),
        ("llmkit-train lora.r=4 model=mist", ["model=mistral7b", "model=mistral7b_instruct"]),
        ("llmkit-train method=lora lora.lora_", ["lora.lora_alpha=", "lora.lora_dropout="]),
        ("llmkit-train training.max_gr", ["training.max_grad_norm="]),
        ("llmkit-train model=org/name data.path=a=b,c lora.lora_a", ["lora.lora_alpha="]),
        ("llmkit-train -m lora.r=4,8 preci", ["precision=", "precision."]),
    ],
)
def test_the_shell_completes_groups_options_and_keys(monkeypatch, capsys, line, offered):
    assert sorted(complete(monkeypatch, capsys, line)) == sorted(offered)


@pytest.mark.parametrize("line", ["foo=1 nonsens", "lora.r=[1 mod", "nowhere.yaml nonsens", "--nonsense nonsens"])
def test_completion_says_nothing_for_a_line_that_cannot_be_read(monkeypatch, capsys, line):
    assert complete(monkeypatch, capsys, f"llmkit-train {line}") == []


def test_the_shell_completes_after_a_users_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "my.yaml").write_text("method: freeze\n")

    assert complete(monkeypatch, capsys, f"llmkit-train {tmp_path}/my.yaml freeze.emb") == ["freeze.embeddings="]


def test_completion_is_installed_for_the_command_that_prints_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/llmkit-train"])

    assert train.main(["-sc", "install=bash"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("-F hydra_bash_completion llmkit-train")


def test_an_unknown_shell_is_an_error_and_no_traceback(capsys):
    assert train.main(["-sc", "install=tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err


def test_bash_completes_the_installed_command(shim, tmp_path):
    line = "llmkit-train method=f"
    program = f"""
        eval "$(llmkit-train -sc install=bash)"
        COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE); COMP_CWORD=1
        hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["method=freeze", "method=full"]


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]], ids=" ".join)
def test_a_reader_that_leaves_early_ends_the_command_in_peace(shim, tmp_path, words):
    process = subprocess.Popen([shim, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()

    assert err == b""
    assert process.returncode == 0


def test_ctrl_c_while_composing_leaves_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert cli.guarded(interrupted, []) == 130
    assert capsys.readouterr().err == ""
