"""`llmkit export`: which model it means, merged or copied, and the list of what a copy holds."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkit import export, rundir
from llmkit.serving.publishing import hub_address
from llmkit.storage import open_place

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations


@pytest.fixture
def run_dir(tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, `runs/tuned` seen from where the test is."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tuned_run, tmp_path / "runs" / "tuned")).relative_to(tmp_path)


@pytest.fixture
def exported(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function: the words of `llmkit export` -> exit code, what it said, what it said of errors."""

    def call(*words: Any) -> tuple[int, str, str]:
        code = export.main([str(word) for word in words])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def files_of(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def assert_listed(files: dict[str, bytes]) -> None:
    """files.json lists every file with its size and digest, but for the lists themselves."""
    listed = json.loads(files["files.json"])["files"]
    lists = {"files.json", "final.json", "merged.json"}
    assert set(listed) >= files.keys() - lists
    for name, about in listed.items():
        assert about == {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}


def test_alone_it_merges_the_newest_finished_run_and_says_which(run_dir, exported):
    code, said, _ = exported("merge=true")

    assert code == 0
    assert said.startswith("run=runs/tuned: the newest finished run\nmerging run=runs/tuned into ")
    assert json.loads((run_dir / "merged" / "parity.json").read_text())["mean_kl"] < 1e-5
    assert not list(run_dir.glob(".merged*"))


def test_the_second_time_it_is_there_already(run_dir, exported):
    exported("merge=true")

    code, said, _ = exported(f"run={run_dir}", "merge=true")

    assert (code, "is this model already" in said) == (0, True)


def test_a_checkpoint_is_merged_beside_the_run_under_its_own_name(run_dir, exported):
    exported("merge=true")

    code, _, errors = exported(f"run={run_dir}/checkpoints/step-00000010", "merge=true")

    assert (code, errors.count("error")) == (0, 0)
    last, tenth = ((run_dir / name / "model.safetensors").read_bytes() for name in ("merged", "merged-step-00000010"))
    assert last != tenth


def test_the_best_run_of_a_sweep_is_meant_by_the_sweep(run_dir, exported):
    jobs = [{"overrides": [], "run_dir": str(run_dir), "status": "completed", "objective": 1.0}]
    rundir.write_json(run_dir.parent / "sweep.json", {"objective": "eval_loss", "jobs": jobs})

    code, _, _ = exported(f"sweep={run_dir.parent}", "merge=true")

    assert code == 0
    assert (run_dir / "merged" / "merge.json").exists()


def test_limits_of_the_command_line_win_over_those_of_the_run_and_a_refusal_leaves_nothing(run_dir, exported):
    code, _, errors = exported("merge=true", "export.max_kl=1e-15")

    assert code == 1
    assert "export.max_kl=1e-15" in errors
    assert not (run_dir / "merged").exists()


@pytest.mark.parametrize("words", [(), ("checkpoints=true",)], ids=["model", "checkpoints too"])
def test_a_copy_lists_its_files_with_size_and_digest(run_dir, exported, tmp_path, words):
    code, said, _ = exported(f"to={tmp_path}/copy", *words)

    files = files_of(tmp_path / "copy")
    assert (code, said.splitlines()[-1]) == (0, f"{tmp_path}/copy holds runs/tuned")
    assert_listed(files)
    assert "final/adapter_model.safetensors" in files
    assert ("checkpoints/step-00000020/optimizer.pt" in files) == bool(words)


def test_a_merged_model_is_copied_instead_of_the_adapter_and_can_be_merged_and_sent_again(
    run_dir, exported, s3_url, tmp_path
):
    from llmkit.serving.target import of_run

    code, said, _ = exported("merge=true", f"to={s3_url}/alpha")
    assert (code, said.splitlines()[-1]) == (0, f"{s3_url}/alpha holds {run_dir.absolute()}/merged")

    place = open_place(f"{s3_url}/alpha", of_run(run_dir).run.storage)
    files = {name: place.read(name) for name in place.files()}
    assert_listed(files)
    assert {"merged/model.safetensors", "config.yaml", "result.json"} <= files.keys()
    assert not any(name.startswith("final") for name in files)
    versions = {name: entry.version for name, entry in place.files().items() if name.startswith("merged/")}

    assert exported("merge=true", f"to={s3_url}/alpha")[0] == 0
    assert versions == {n: entry.version for n, entry in place.files().items() if n.startswith("merged/")}
    assert of_run(f"{s3_url}/alpha/merged").is_whole


def test_a_run_in_a_bucket_is_merged_on_this_machine(run_dir, exported, s3_url):
    exported(f"to={s3_url}/tuned")
    here, _ = exported("merge=true"), shutil.move(run_dir / "merged", "here")

    code, _, _ = exported(f"run={s3_url}/tuned", "merge=true")

    assert (here[0], code) == (0, 0)
    assert (
        Path("runs/served/tuned/merged/model.safetensors").read_bytes() == Path("here/model.safetensors").read_bytes()
    )


TRAINED = ("train", "name=alpha", "training.max_steps=2", "evaluation=off", "export.merge=true")


def test_training_merges_at_its_end_when_asked(run_llmkit, tmp_path):
    done = run_llmkit(*TRAINED)

    assert done.returncode == 0, done.stderr
    assert "merge      merged and unmerged: mean KL" in done.stdout
    assert (tmp_path / "runs" / "alpha" / "merged" / "merge.json").exists()


def test_a_run_whose_merge_fails_is_completed_and_the_command_fails(run_llmkit, tmp_path):
    done = run_llmkit(*TRAINED, "export.max_kl=1e-15")

    run_dir = tmp_path / "runs" / "alpha"
    assert done.returncode == 1
    assert "export.max_kl=1e-15" in done.stderr
    assert "merge it later with: llmkit export run=runs/alpha merge=true" in done.stderr
    assert json.loads((run_dir / "result.json").read_text())["status"] == "completed"
    assert not list(run_dir.glob("*merged*"))


def test_a_setting_of_merging_without_effect_is_warned_of(compose):
    from llmkit.config.validate import warnings

    words = ("export.merge=true", "export.merge_base=original")

    assert any(
        "export.merge=true has no effect with method=full" in line for line in warnings(compose("method=full", *words))
    )
    assert any("export.merge_base=original has no effect" in line for line in warnings(compose("method=lora", *words)))
    assert not any("export." in line for line in warnings(compose("method=qlora", *words)))


def test_what_is_somebody_elses_stays(run_dir, exported, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "thesis.tex").write_text("precious")

    for words in ([], ["merge=true"]):
        code, _, errors = exported(f"to={tmp_path}/copy", *words)

        assert (code, "holds other files; choose another to=." in errors) == (2, True)
    assert files_of(tmp_path / "copy") == {"thesis.tex": b"precious"}


def test_a_run_at_work_is_neither_copied_nor_merged(run_dir, exported, tmp_path):
    with rundir.lock(run_dir):
        for words in ([f"to={tmp_path}/copy"], ["merge=true"]):
            code, _, errors = exported(*words)

            assert (code, "is in use by process" in errors) == (2, True)


MISTAKES = {
    "nothing to do": ("run=runs/tuned", "to=PLACE or merge=true is missing"),
    "two sources": ("run=a sweep=b merge=true", "run and sweep: one of them at a time."),
    "a base without merging": ("to=there merge_base=original", "merge_base: only merging has a base; add merge=true."),
    "no such base": ("merge=true merge_base=orginal", "merge_base=orginal: dequantized or original."),
    "a base twice": ("merge=true merge_base=original export.merge_base=original", "give one of them"),
    "checkpoints of a merged model": ("merge=true checkpoints=true", "checkpoints=true: only the copy of a run"),
    "checkpoints on the hub": ("to=hub://org/name checkpoints=true", "checkpoints=true: only the copy of a run"),
    "a public directory": ("to=there public=true", "public: only what goes to the hub"),
    "a limit out of range": ("merge=true export.max_kl=-1", "export.max_kl=-1"),
    "a limit misspelt": ("merge=true export.max_k=1", "export.max_k", "max_kl"),
    "no name on the hub": ("to=hub://org", "write hub://ORG/NAME"),
    "a checkpoint on the hub": ("run=runs/tuned/checkpoints/step-00000010 to=hub://org/name", "merge=true makes one"),
    "a copy from a bucket": ("run=s3://bucket/alpha to=there", "with merge=true a bucket will do"),
    "a word misspelt": ("merge=true too=there", "too=there", "Did you mean 'to'?"),
}


@pytest.mark.parametrize(("words", "named"), [(one[0], one[1:]) for one in MISTAKES.values()], ids=MISTAKES)
def test_a_mistake_is_explained(run_dir, exported, words, named):
    code, _, errors = exported(*words.split())

    assert code == 2
    assert all(fragment in errors for fragment in named), errors


@pytest.mark.parametrize("name", ["hub://org/name", "hub://Org-1/my.model_2/"])
def test_an_address_on_the_hub_is_read(name):
    assert hub_address(name).id == name.removeprefix("hub://").rstrip("/")


def test_help_shows_examples(exported):
    code, said, _ = exported("--help")

    assert code == 0
    assert "llmkit export sweep=runs/ranks merge=true to=hub://org/name" in said
