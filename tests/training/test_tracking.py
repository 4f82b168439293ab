"""W&B for real: a run without a key writes an offline file, which is read back record by record."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.training.metrics import read_metrics

BLOCK = 32768  # LevelDB's log format: https://github.com/google/leveldb/blob/main/doc/log_format.md
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The payloads of a .wandb file: a header of 7 bytes, then LevelDB's framing."""
    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _crc, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """(run directory, the protobuf records of its W&B file), of one of two runs that train together in one process"""
    from wandb.proto import wandb_internal_pb2

    directory = tmp_path_factory.mktemp("wandb")
    words = ["tracking=wandb", "tracking.tags=[demo,tiny]", "tracking.project=proof", "name=alpha", "-m", "lora.r=2,4"]
    words += ["launcher=packed", "launcher.width=2"]
    words += ["training.max_steps=4", "training.logging_steps=2", "evaluation.examples=2"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "SOME_TOKEN": "hunter2"}
    done = subprocess.run(
        [sys.executable, "-m", "llmkit.train", *words],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = directory / "runs/alpha/r=4"
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    parsed = []
    for payload in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        parsed.append(record)
    return run_dir, parsed


def history(parsed):
    for record in parsed:
        if record.WhichOneof("record_type") == "history":
            yield {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def test_project_group_name_and_tags_come_from_the_config(offline_run):
    run_dir, parsed = offline_run
    (run,) = [record.run for record in parsed if record.WhichOneof("record_type") == "run"]

    assert run.project == "proof"
    assert run.run_group == "alpha"  # a sweep's runs are grouped under its name
    assert run.display_name == run_dir.name
    assert list(run.tags) == ["demo", "tiny"]


def test_metrics_are_those_of_metrics_jsonl(offline_run):
    run_dir, parsed = offline_run
    logged = list(history(parsed))

    for record in read_metrics(run_dir):
        same_step = [row for row in logged if row.get("step") == record["step"]]
        for key, value in record.items():
            assert any(row.get(key) == pytest.approx(value) for row in same_step), (record["step"], key)


def test_plot_and_samples_are_logged(offline_run):
    logged = list(history(offline_run[1]))

    kinds = {key: value for row in logged for key, value in row.items() if key.endswith("_type")}
    assert kinds["loss_plot._type"] == "image-file"
    assert kinds["samples._type"] == "table-file"


def test_the_resolved_config_is_uploaded_without_secrets(offline_run):
    run_dir, parsed = offline_run
    uploaded = {}
    for record in parsed:
        if record.WhichOneof("record_type") == "run":
            uploaded |= {item.key: json.loads(item.value_json) for item in record.run.config.update}

    assert uploaded["lora"]["lora_alpha"] == 8
    assert uploaded["precision"]["name"] == "fp32"
    everything = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"hunter2" not in everything


def test_a_tracker_that_cannot_be_reached_does_not_hold_up_the_run(run_llmkit, tmp_path):
    nowhere = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}

    done = run_llmkit("train", "tracking=wandb", "name=alpha", "training.max_steps=1", "evaluation=off", env=nowhere)

    assert done.returncode == 0, done.stderr
    assert "W&B cannot be reached" in done.stderr
    assert list((tmp_path / "runs/alpha/wandb").glob("offline-run-*/run-*.wandb"))
    assert "a" * 40 not in done.stdout + done.stderr


def test_a_run_started_from_a_process_that_uses_the_tracker_itself_reaches_the_disk(tmp_path):
    notebook = """
import subprocess, sys, wandb

with wandb.init(mode="offline", dir=sys.argv[1]):
    sys.exit(subprocess.run(sys.argv[2:], cwd=sys.argv[1], check=False).returncode)
"""
    words = ["tracking=wandb", "name=alpha", "training.max_steps=1", "evaluation=off"]
    command = [sys.executable, "-c", notebook, str(tmp_path), sys.executable, "-m", "llmkit.train", *words]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "runs/alpha/wandb").glob("offline-run-*/run-*.wandb"))


def test_a_run_that_goes_on_is_the_same_run_to_the_tracker(tmp_path):
    directory, env = tmp_path, os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = ["tracking=wandb", "name=alpha", "evaluation=off", "training.save_steps=2", "training.max_steps=3"]
    for more in ([], ["training.max_steps=4", "resume_allow=[training.max_steps]"]):
        done = subprocess.run(
            [sys.executable, "-m", "llmkit.train", *words, *more],
            cwd=directory,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    files = list((directory / "runs/alpha/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1  # run-<id>
    manifests = [json.loads(file.read_text()) for file in directory.glob("runs/alpha/checkpoints/*/MANIFEST.json")]
    assert {f"run-{saved['tracker']}" for saved in manifests} == {files[0].stem}
