"""A run and its copy in a bucket: nothing else moves it, and nothing the bucket does makes it start over unasked."""

import dataclasses
import json
import threading
import time
from types import SimpleNamespace

import pytest
from fault_proxy import Answer, FaultProxy, Flip, denied
from safetensors.torch import load_file

from llmkit import rundir
from llmkit.config import save
from llmkit.errors import ConfigError
from llmkit.storage import StorageError, open_place
from llmkit.training.checkpoints import manifest, mirror
from llmkit.training.checkpoints.mirror import NotCopied, publish
from llmkit.training.checkpoints.remote import RemoteRun, TakenOver

EIGHT = ("training.max_steps=8", "training.logging_steps=3", "training.save_steps=2", "lora.lora_dropout=0.1")


@pytest.fixture(scope="module")
def straight(train):
    """The same eight steps, neither interrupted nor copied."""
    return train(*EIGHT)


@pytest.fixture
def proxy(s3_server, s3_url):
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def through(proxy):
    """Settings that reach the bucket through the proxy, and do not wait long."""
    storage = {"endpoint_url": proxy.endpoint, "addressing_style": "path", "timeout_s": 2, "max_attempts": 2}
    return [f"storage.{key}={value}" for key, value in storage.items()]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(mirror, "FIRST_PAUSE", 0.05)


@pytest.fixture
def stopped_at_5(train, s3_url, tmp_path, monkeypatch):
    """A run that a signal stopped at step 5; its directory is gone, its copy is in the bucket."""
    from llmkit.training.callbacks import Saving
    from llmkit.training.stopping import StopRequest

    stop, end_of_step = StopRequest(), Saving.on_step_end

    def ask(callback, args, state, control, **more):
        stop.signal = "SIGTERM" if state.global_step == 5 else None
        end_of_step(callback, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Saving, "on_step_end", ask)
        run = train(*EIGHT, f"checkpoint.remote={s3_url}", run_dir=tmp_path / "one" / "alpha", stop=stop)
    assert run.result["status"] == "preempted"
    publish(remote_run(s3_url, run.config), run.run_dir, checkpoints=2, owned=True)  # as the worker does
    run.run_dir.rename(tmp_path / "gone")
    return run


def weights_of(run) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes() for name, tensor in load_file(run.final / "adapter_model.safetensors").items()
    }


def remote_run(url: str, config) -> RemoteRun:
    return RemoteRun(open_place(f"{url}/alpha", config.storage))


def test_a_run_moves_to_an_empty_directory_through_the_bucket_alone_and_ends_the_same(
    train, straight, stopped_at_5, s3_url, tmp_path, capfd
):
    moved = train(*EIGHT, f"checkpoint.remote={s3_url}", run_dir=tmp_path / "two" / "alpha")

    assert f"goes on from step 5 (the newest at {s3_url}/alpha)" in capfd.readouterr().out
    assert weights_of(moved) == weights_of(straight)
    assert [record["step"] for record in moved.metrics() if "loss" in record] == [1, 3, 6, 8]


@pytest.mark.parametrize(
    "fault",
    [
        denied(),
        Answer(status=500, times=None),
        Answer(status=404, code="NoSuchBucket", times=None),
        Answer(status=200, body=b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", times=None),
    ],
    ids=["denied", "failing", "no bucket", "a listing cut off"],
)
def test_an_answer_other_than_not_there_never_starts_over(train, stopped_at_5, s3_url, proxy, through, tmp_path, fault):
    proxy.faults = [dataclasses.replace(fault)]

    with pytest.raises(StorageError):
        train(*EIGHT, f"checkpoint.remote={s3_url}", *through, run_dir=tmp_path / "two" / "alpha")

    assert not (tmp_path / "two" / "alpha" / rundir.METRICS).exists()


def test_a_store_that_cannot_be_reached_never_starts_over(train, stopped_at_5, s3_url, tmp_path):
    nobody = ["storage.endpoint_url=http://127.0.0.1:9", "storage.max_attempts=1"]

    with pytest.raises(StorageError, match=r"cannot be reached|connect"):
        train(*EIGHT, f"checkpoint.remote={s3_url}", *nobody, run_dir=tmp_path / "two" / "alpha")


def test_a_checkpoint_damaged_in_the_bucket_gives_way_to_the_one_before(
    train, straight, stopped_at_5, s3_url, proxy, through, tmp_path, capfd
):
    proxy.faults = [Flip(method="GET", path="step-00000005/optimizer.pt", at=1000, times=None)]

    moved = train(*EIGHT, f"checkpoint.remote={s3_url}", *through, run_dir=tmp_path / "two" / "alpha")

    said = capfd.readouterr()
    assert "step-00000005/optimizer.pt is not what it should be" in said.err
    assert "goes on from step 4" in said.out
    assert weights_of(moved) == weights_of(straight)


def test_where_every_checkpoint_in_the_bucket_is_damaged_nothing_starts_over(
    train, stopped_at_5, s3_url, proxy, through, tmp_path
):
    proxy.faults = [Flip(method="GET", path="optimizer.pt", at=1000, times=None)]

    with pytest.raises(StorageError, match="every checkpoint of this run is damaged"):
        train(*EIGHT, f"checkpoint.remote={s3_url}", *through, run_dir=tmp_path / "two" / "alpha")


def test_the_bucket_has_whole_what_is_damaged_here(train, straight, stopped_at_5, s3_url, tmp_path, capfd):
    (tmp_path / "gone").rename(stopped_at_5.run_dir)
    for weights in stopped_at_5.run_dir.glob("checkpoints/*/adapter_model.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    run = train(*EIGHT, f"checkpoint.remote={s3_url}", run_dir=stopped_at_5.run_dir)

    assert f"goes on from step 5 (the newest at {s3_url}/alpha)" in capfd.readouterr().out
    assert weights_of(run) == weights_of(straight)


def test_a_run_at_work_is_not_finished_to_anybody_and_a_second_one_takes_the_place_over(tmp_path, s3_url, compose):
    config = compose("evaluation=off", f"checkpoint.remote={s3_url}")
    place = open_place(f"{s3_url}/alpha", config.storage)
    save(config, tmp_path)
    place.write(rundir.RESULT, b'{"status": "completed"}')
    first = RemoteRun(place)

    first.claim(tmp_path)
    assert first.result() is None
    assert first.config() is not None
    first.check_owner()
    place.write("owner.json", b"another")
    with pytest.raises(TakenOver, match="another process has begun to write there"):
        first.check_owner()


def test_a_step_that_is_sent_again_never_stands_under_an_older_manifest(stopped_at_5, s3_url, monkeypatch):
    remote = remote_run(s3_url, stopped_at_5.config)
    checkpoint = stopped_at_5.run_dir.parent.parent / "gone" / "checkpoints" / "step-00000005"
    saved = json.loads((checkpoint / "MANIFEST.json").read_text())
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest.sealed(saved | {"seconds": 0})))
    monkeypatch.setattr(type(remote.place), "upload", fail)

    with pytest.raises(StorageError):
        remote.send(checkpoint)

    assert list(remote.checkpoints()) == [4]


def fail(*_, **__):
    raise StorageError("away")


def test_export_touches_nothing_that_is_not_its_own(train, tmp_path, run_llmkit):
    run = train(*EIGHT, run_dir=tmp_path / "alpha")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")

    refused = run_llmkit("export", f"run={run.run_dir}", f"to={tmp_path / 'mine'}")
    done = run_llmkit("export", f"run={run.run_dir}", f"to={tmp_path / 'copy'}")
    (tmp_path / "copy" / "final" / "mine.txt").write_text("mine")
    again = run_llmkit("export", f"run={run.run_dir}", f"to={tmp_path / 'copy'}")

    assert (refused.returncode, done.returncode, again.returncode) == (2, 0, 0)
    assert "holds other files" in refused.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert (tmp_path / "copy" / "final" / "mine.txt").exists()


def test_a_checkpoint_without_its_manifest_is_not_there(stopped_at_5, s3_url):
    remote = remote_run(s3_url, stopped_at_5.config)
    assert list(remote.checkpoints()) == [4, 5]

    remote.place.delete(["checkpoints/step-00000005/MANIFEST.json"])
    remote.place.delete(["checkpoints/step-00000004/scheduler.pt"])

    assert remote.checkpoints() == {}


def test_training_goes_on_through_an_outage_and_the_copy_is_whole_afterwards(
    train, straight, s3_url, proxy, through, quick, tmp_path, capfd
):
    proxy.faults = [Answer(status=503, method="PUT", path="checkpoints", times=6)]

    run = train(*EIGHT, f"checkpoint.remote={s3_url}", *through, run_dir=tmp_path / "alpha")
    rundir.write_result(run.run_dir, **run.result)  # as the worker does
    publish(remote_run(s3_url, run.config), run.run_dir, checkpoints=2)

    assert "Training goes on, and the copy is tried again." in capfd.readouterr().err
    assert weights_of(run) == weights_of(straight)
    remote = remote_run(s3_url, run.config)
    assert list(remote.checkpoints())[-1] == 8
    assert remote.result()["status"] == "completed"
    assert {f"final/{path.name}" for path in run.final.iterdir()} <= remote.place.files().keys()


def test_what_is_not_copied_at_the_end_is_said_and_export_sends_it_later(
    train, s3_url, proxy, through, quick, tmp_path, run_llmkit
):
    run = train(*EIGHT, run_dir=tmp_path / "alpha")
    rundir.write_result(run.run_dir, **run.result)
    config = train_config_with(run.config, proxy.endpoint)
    proxy.faults = [denied(method="PUT")]

    with pytest.raises(NotCopied, match=f"llmkit export run={run.run_dir} to={s3_url}/alpha checkpoints=true"):
        publish(remote_run(s3_url, config), run.run_dir, checkpoints=2, patience=0.5)
    assert remote_run(s3_url, run.config).result() is None

    done = run_llmkit("export", f"run={run.run_dir}", f"to={s3_url}/alpha", "checkpoints=true")

    assert done.returncode == 0, done.stderr
    assert list(remote_run(s3_url, run.config).checkpoints()) == [6, 8]


def train_config_with(config, endpoint: str):
    storage = dataclasses.replace(config.storage, endpoint_url=endpoint, addressing_style="path", max_attempts=1)
    return dataclasses.replace(config, storage=storage)


def test_files_that_could_run_code_are_not_loaded_from_a_bucket_unless_trusted(train, stopped_at_5, s3_url, tmp_path):
    place = open_place(f"{s3_url}/alpha/checkpoints/step-00000005", stopped_at_5.config.storage)
    saved = json.loads(place.read("MANIFEST.json"))
    saved["files"]["global_step5/mp_rank_00_model_states.pt"] = {"size": 1, "sha256": "0" * 64}
    place.write("global_step5/mp_rank_00_model_states.pt", b"x")
    place.write("MANIFEST.json", json.dumps(manifest.sealed(saved)).encode())

    with pytest.raises(ConfigError, match=r"mp_rank_00_model_states\.pt.*checkpoint\.trust=true"):
        train(*EIGHT, f"checkpoint.remote={s3_url}", run_dir=tmp_path / "two" / "alpha")


def test_a_finished_run_is_known_from_the_bucket_and_another_config_is_refused(train, s3_url, tmp_path, compose):
    from llmkit.launchers.prepare import finished_elsewhere

    words = (*EIGHT, "evaluation=off", f"checkpoint.remote={s3_url}")
    run = train(*EIGHT, run_dir=tmp_path / "alpha")
    rundir.write_result(run.run_dir, **run.result)
    publish(remote_run(s3_url, run.config), run.run_dir, checkpoints=2)

    there, result = finished_elsewhere(compose(*words), tmp_path / "empty" / "alpha")
    with pytest.raises(ConfigError, match=r"(?s)holds a run of another config.*seed: 42 -> 7"):
        finished_elsewhere(compose(*words, "seed=7"), tmp_path / "empty" / "alpha")
    with pytest.raises(ConfigError, match=r"resume=never: .* holds a run already"):
        finished_elsewhere(compose(*words, "resume=never"), tmp_path / "empty" / "alpha")

    assert (there, result["steps"]) == (f"{s3_url}/alpha", 8)
    assert finished_elsewhere(compose(*words), tmp_path / "empty" / "beta") is None


def test_of_several_checkpoints_that_wait_only_the_newest_is_copied_and_none_is_rotated_away(tmp_path):
    copied, free = [], threading.Event()

    class Slow:
        place = SimpleNamespace(abort_stale_uploads=lambda older_than: 0)

        def check_owner(self):
            pass

        def send(self, checkpoint):
            free.wait(10)
            copied.append(checkpoint.name)

        def send_records(self, run_dir):
            pass

        def rotate(self, *, keep):
            pass

    copy = mirror.Mirror(Slow(), tmp_path, keep=1, warn=pytest.fail)
    first = copy.offer(tmp_path / "step-1")
    while copy._under_way is None:
        time.sleep(0.01)
    second, third = copy.offer(tmp_path / "step-2"), copy.offer(tmp_path / "step-3")
    free.set()
    deadline = time.monotonic() + 10
    while len(copied) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    copy.close()

    assert copied == ["step-1", "step-3"]
    assert first == {tmp_path / "step-1"}
    assert second == {tmp_path / "step-1", tmp_path / "step-2"}
    assert third == {tmp_path / "step-1", tmp_path / "step-3"}
