"""What counts as a checkpoint, what goes with time, and what is left after a save was cut off or failed."""

from pathlib import Path

import pytest
import torch

from llmkit.training.checkpoints import manifest
from llmkit.training.checkpoints.saving import CheckpointWriter, HostCopy, SaveError


def save(run_dir: Path, step: int, *, keep: int = 2, **facts) -> CheckpointWriter:
    writer = CheckpointWriter(run_dir, keep=keep, warn=pytest.fail)
    writer.save(step, {"model.safetensors": {"w": torch.full((3,), float(step))}, "note.json": "{}"}, facts)
    writer.wait()
    return writer


def steps(run_dir: Path) -> list[int]:
    return [manifest.step_of(path) for path in manifest.committed(run_dir)]


def test_a_checkpoint_lists_size_and_hash_of_every_file_and_what_the_run_says(tmp_path):
    save(tmp_path, 7, seconds=1.5)

    saved = manifest.read_manifest(manifest.latest(tmp_path))

    assert saved["step"] == 7
    assert saved["seconds"] == 1.5
    assert {name: sorted(about) for name, about in saved["files"].items()} == {
        "model.safetensors": ["sha256", "size"],
        "note.json": ["sha256", "size"],
    }
    manifest.verify(manifest.latest(tmp_path))


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "a file less", "a shorter file"])
def test_what_its_manifest_does_not_vouch_for_does_not_exist(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, step)
    newest = manifest.latest(tmp_path)
    listing, weights = newest / manifest.MANIFEST, newest / "model.safetensors"
    if damage == "no manifest":
        listing.unlink()
    elif damage == "half a manifest":
        listing.write_text(listing.read_text()[:40])
    elif damage == "a file less":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])

    assert steps(tmp_path) == [1]


def test_a_flipped_byte_is_found_where_sizes_agree(tmp_path):
    save(tmp_path, 1)
    checkpoint = manifest.latest(tmp_path)
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)

    with pytest.raises(manifest.DamagedCheckpoint, match=r"model\.safetensors is not what was saved"):
        manifest.verify(checkpoint)


def test_the_newest_and_the_best_stay(tmp_path):
    for step, loss in [(1, 0.9), (2, 0.3), (3, 0.5), (4, 0.6), (5, None)]:
        save(tmp_path, step, eval_loss=loss)

    assert steps(tmp_path) == [2, 4, 5]


def test_what_is_still_needed_elsewhere_is_not_rotated_out(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)

    first, *_ = manifest.committed(tmp_path)
    manifest.rotate(tmp_path, keep=1, needed={first})

    assert steps(tmp_path) == [1, 3]


def test_leftovers_of_a_killed_save_go_and_nothing_else_does(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in (".partial-step-00000002", ".discarded-step-00000000", "mine"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")

    manifest.remove_leftovers(tmp_path)

    assert sorted(path.name for path in folder.iterdir()) == ["mine", "step-00000001"]


def test_a_step_that_is_saved_twice_keeps_the_first_whole_one(tmp_path):
    save(tmp_path, 1, attempt=1)
    save(tmp_path, 1, attempt=2)

    assert manifest.read_manifest(manifest.latest(tmp_path))["attempt"] == 1


def test_a_save_holds_the_values_of_its_step_though_training_goes_on(tmp_path):
    weights = torch.zeros(1000)
    writer = CheckpointWriter(tmp_path, keep=9, warn=pytest.fail)
    for step in range(1, 5):
        weights.fill_(step)
        writer.save(step, {"optimizer.pt": {"state": {0: {"exp_avg": weights}}, "groups": [{"lr": step}]}}, {})
        weights.fill_(-1)
    writer.wait()

    for checkpoint in manifest.committed(tmp_path):
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        assert torch.equal(saved["state"][0]["exp_avg"], torch.full((1000,), float(manifest.step_of(checkpoint))))
        assert saved["groups"] == [{"lr": manifest.step_of(checkpoint)}]


def test_copies_use_the_same_memory_again():
    copy, tensor = HostCopy(), torch.ones(4)

    first, second = copy.of({"a": tensor}), copy.of({"a": tensor})

    assert first["a"].data_ptr() == second["a"].data_ptr() != tensor.data_ptr()


def test_a_save_that_fails_is_told_leaves_nothing_and_the_next_one_counts(tmp_path, monkeypatch):
    told: list[str] = []
    writer = CheckpointWriter(tmp_path, keep=2, warn=told.append)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "commit", fail_with(OSError(28, "No space left on device")))
        writer.save(1, {"note.json": "{}"}, {})
        writer.save(2, {"note.json": "{}"}, {})
        with pytest.raises(SaveError, match="could not be written"):
            writer.wait()
    writer.save(3, {"note.json": "{}"}, {})
    writer.wait()

    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert "free on that disk" in told[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_file_of_the_run_is_saved_as_it_was_when_the_save_began(tmp_path):
    best = tmp_path / "best"
    best.write_text("old")
    writer = CheckpointWriter(tmp_path, keep=2, warn=pytest.fail)
    writer.save(1, {"best.safetensors": best}, {})
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").replace(best)  # as BestWeights does
    writer.wait()

    assert (manifest.latest(tmp_path) / "best.safetensors").read_text() == "old"
    assert manifest.read_manifest(manifest.latest(tmp_path))["files"]["best.safetensors"]["size"] == 3


def fail_with(error: Exception):
    def fail(*_, **__):
        raise error

    return fail
