"""Sweeps and single runs on this machine, for real: processes, signals, run directories."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkit.config import load

CHECKOUT = Path(__file__).parents[2]
FAST = ("training.max_steps=4", "evaluation=off", "training.logging_steps=1")


def sweep_of(directory: Path) -> list[dict]:
    return json.loads((directory / "sweep.json").read_text())["jobs"]


def test_the_missions_command_sweeps_a_hub_model_with_the_flag_between_the_overrides(
    run_llmkit, hub_with_mistral, tmp_path
):
    command = ("train", "method=lora", "model=mistral7b", "-m", "lora.r=4,8,16", "name=alpha", *FAST)

    done = run_llmkit(*command, env=hub_with_mistral)

    assert done.returncode == 0, done.stderr
    jobs = sweep_of(tmp_path / "runs/alpha")
    assert [job["status"] for job in jobs] == ["completed"] * 3
    assert [Path(job["run_dir"]).name for job in jobs] == ["r=4", "r=8", "r=16"]
    for job, r in zip(jobs, (4, 8, 16), strict=True):
        config = load(tmp_path / job["run_dir"])
        assert (config.lora.r, config.lora.lora_alpha) == (r, 2 * r)
        assert config.model.commit.startswith("0123456789")
        adapter = json.loads((tmp_path / job["run_dir"] / "final/adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "mistralai/Mistral-7B-v0.1"
        assert json.loads((tmp_path / job["run_dir"] / "result.json").read_text())["objective"] == job["objective"]
    ranking = done.stdout[done.stdout.index("ranked by eval_loss") :]
    best = min(jobs, key=lambda job: job["objective"])
    assert f"best: {best['run_dir']}/final" in ranking
    assert "lora_alpha" in ranking
    assert (tmp_path / "runs/alpha/sweep.png").read_bytes().startswith(b"\x89PNG")

    again = run_llmkit(*command, env=hub_with_mistral)
    assert again.returncode == 0
    assert "0 jobs to run; 3 finished before and are kept" in again.stdout
    assert sweep_of(tmp_path / "runs/alpha") == jobs


def test_one_failed_job_hides_nothing_and_runs_again_when_its_cause_is_gone(run_llmkit, tmp_path, chats_file):
    data = chats_file()
    missing = tmp_path / "later.jsonl"
    missing.write_text("not json\n")
    command = (
        "train",
        "-m",
        f"data.path={data},{missing}",
        "data.validation=null",
        "name=two",
        *FAST,
    )

    first = run_llmkit(*command)

    assert first.returncode == 1
    good, bad = sweep_of(tmp_path / "runs/two")
    assert (good["status"], bad["status"]) == ("completed", "failed")
    assert f"{missing}, line 1: not JSON" in bad["error"]
    assert f"{missing}, line 1: not JSON" in first.stdout

    missing.write_text(data.read_text())
    second = run_llmkit(*command)
    assert second.returncode == 0, second.stderr
    assert "1 job to run; 1 finished before and are kept" in second.stdout
    assert [job["status"] for job in sweep_of(tmp_path / "runs/two")] == ["completed", "completed"]


def test_ranges_globs_and_several_keys_make_the_jobs_hydra_makes(run_llmkit, tmp_path):
    done = run_llmkit(
        "train",
        "-m",
        "lora.r=range(2,6,2)",
        "method=glob(lor*)",
        "training.learning_rate=1e-3,1e-2",
        "name=grid",
        "launcher.max_parallel=2",
        "training.max_steps=1",
        "evaluation=off",
    )

    assert done.returncode == 0, done.stderr
    names = {Path(job["run_dir"]).name for job in sweep_of(tmp_path / "runs/grid")}
    assert names == {f"learning_rate={rate}_r={r}" for rate in ("0.001", "0.01") for r in (2, 4)}


def test_a_longer_random_search_keeps_the_runs_of_a_shorter_one_and_adds_to_them(run_llmkit, tmp_path):
    rate = "training.learning_rate=tag(log,interval(1e-4,1e-2))"
    command = ("train", "sweeper=random", rate, "lora.r=choice(2,4)", "name=search", *FAST)

    first = run_llmkit(*command, "sweeper.n=1")
    assert first.returncode == 0, first.stderr
    (kept,) = sweep_of(tmp_path / "runs/search")
    written = (tmp_path / kept["run_dir"] / "result.json").stat().st_mtime_ns
    second = run_llmkit(*command, "sweeper.n=3")

    assert second.returncode == 0, second.stderr
    assert "2 jobs to run; 1 finished before and are kept" in second.stdout
    jobs = sweep_of(tmp_path / "runs/search")
    assert jobs[0] == kept
    assert (tmp_path / kept["run_dir"] / "result.json").stat().st_mtime_ns == written
    assert [job["status"] for job in jobs] == ["completed"] * 3
    for job in jobs:
        config = load(tmp_path / job["run_dir"])
        assert Path(job["run_dir"]).name == f"learning_rate={config.training.learning_rate}_r={config.lora.r}"
    assert "ranked by eval_loss" in second.stdout


def test_hydras_own_sweep_directory_is_honoured(run_llmkit, tmp_path):
    done = run_llmkit("train", "-m", "seed=1", "hydra.sweep.dir=mine", "training.max_steps=1", "evaluation=off")

    assert done.returncode == 0, done.stderr
    assert sweep_of(tmp_path / "mine")[0]["status"] == "completed"


def test_a_sweep_needs_no_other_package_to_bring_hydras_plugin_namespace(run_llmkit, tmp_path):
    """The train layer has no hydra plugin; the test environment may."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoPlugins:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'hydra_plugins':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, NoPlugins())\n"
    )
    done = run_llmkit("train", "-m", "lora.r=2", "name=s", *FAST, env={"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"})

    assert done.returncode == 0, done.stderr
    assert sweep_of(tmp_path / "runs/s")[0]["status"] == "completed"


def test_a_second_signal_ends_a_sweep_at_once_and_starts_no_other_job(tmp_path):
    driver = start(tmp_path, "name=long", "-m", "lora.r=4,8", *LONG)
    wait_for_steps(tmp_path / "runs/long/r=4/metrics.jsonl", 1)

    driver.send_signal(signal.SIGINT)
    time.sleep(0.01)
    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=60)[0]

    assert driver.returncode == 75, output
    assert "The same command goes on." in output
    first, second = sweep_of(tmp_path / "runs/long")
    assert first["status"] in ("stopped", "preempted")
    assert second["status"] == "waiting"


def test_a_sweep_that_runs_is_not_started_twice(tmp_path, run_llmkit):
    words = ("name=long", "-m", "lora.r=4,8", *LONG)
    driver = start(tmp_path, *words)
    wait_for_steps(tmp_path / "runs/long/r=4/metrics.jsonl", 1)
    before = sweep_of(tmp_path / "runs/long")

    second = run_llmkit("train", *words)

    assert second.returncode == 2
    assert f"runs/long is in use by process {driver.pid}" in second.stderr
    assert sweep_of(tmp_path / "runs/long") == before
    driver.terminate()
    driver.communicate(timeout=60)


@pytest.mark.parametrize("theirs", ["checkpoints/step-00000001/weights", "config.yaml"])
def test_a_refused_sweep_removes_nothing_that_was_there(run_llmkit, tmp_path, theirs):
    kept = tmp_path / "mine" / theirs
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")

    done = run_llmkit("train", "-m", "data.path=nowhere,nothing", "hydra.sweep.dir=mine")

    assert done.returncode == 2
    assert kept.read_text() == "precious"
    assert not (tmp_path / "mine" / ".lock").exists()


def test_a_refused_sweep_leaves_no_directory_of_its_own(run_llmkit, tmp_path):
    done = run_llmkit("train", "-m", "data.path=nowhere,nothing", "name=s")

    assert done.returncode == 2
    assert not (tmp_path / "runs" / "s").exists()


def test_every_result_has_the_keys_of_the_contract(run_llmkit, tmp_path):
    from llmkit.rundir import RESULT_KEYS

    words = ("method=full", "training.max_steps=20", "evaluation=off")
    assert run_llmkit("train", *words, "name=good").returncode == 0
    assert run_llmkit("train", *words, "name=bad", "training.learning_rate=1e37").returncode == 1

    good, bad = (json.loads((tmp_path / f"runs/{name}/result.json").read_text()) for name in ("good", "bad"))
    assert list(good) == list(bad) == list(RESULT_KEYS)
    assert (good["status"], bad["status"]) == ("completed", "failed")
    assert "not a finite number" in bad["error"]


def test_wrong_input_that_the_worker_finds_leaves_no_run_directory(run_llmkit, chats_file, tmp_path):
    done = run_llmkit("train", f"data.path={chats_file('not json')}", "name=bad")

    assert done.returncode == 2
    assert not (tmp_path / "runs/bad").exists()


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    driver = start(tmp_path, "name=piped", "training.max_steps=30", "evaluation=off", "training.logging_steps=1")
    driver.stdout.readline()
    driver.stdout.close()

    driver.wait(timeout=120)

    assert json.loads((tmp_path / "runs/piped/result.json").read_text())["status"] == "completed"


def start(run_llmkit_cwd: Path, *arguments: str) -> subprocess.Popen:
    checkout = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, "-m", "llmkit.train", *arguments],
        cwd=run_llmkit_cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(metrics: Path, count: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count('"loss"') < count:
        assert time.monotonic() < deadline, "no training step was seen"
        time.sleep(0.1)


LONG = ("training.max_steps=100000", "evaluation=off", "training.logging_steps=1", "training.eval_steps=1000000")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_driver_stops_a_run_that_the_same_command_would_go_on_with(tmp_path, number):
    driver = start(tmp_path, "name=long", *LONG)
    wait_for_steps(tmp_path / "runs/long/metrics.jsonl", 3)

    driver.send_signal(number)
    output = driver.communicate(timeout=60)[0]

    assert driver.returncode == 75, output
    result = json.loads((tmp_path / "runs/long/result.json").read_text())
    assert result["status"] == "preempted"
    assert (tmp_path / f"runs/long/checkpoints/step-{result['steps']:08d}/MANIFEST.json").exists()
    assert f"stopped    by {number.name} at step {result['steps']}" in output


def test_an_interrupted_sweep_leaves_a_consistent_sweep_json(tmp_path):
    driver = start(tmp_path, "name=long", "-m", "lora.r=4,8", *LONG)
    wait_for_steps(tmp_path / "runs/long/r=4/metrics.jsonl", 2)

    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=60)[0]

    assert driver.returncode == 75, output
    assert [job["status"] for job in sweep_of(tmp_path / "runs/long")] == ["preempted", "waiting"]


def test_a_worker_dies_with_its_driver(tmp_path):
    driver = start(tmp_path, "name=long", *LONG)
    wait_for_steps(tmp_path / "runs/long/metrics.jsonl", 2)

    driver.kill()
    driver.communicate(timeout=60)

    deadline = time.monotonic() + 60
    while not (tmp_path / "runs/long/result.json").exists():
        assert time.monotonic() < deadline, "the worker goes on without its driver"
        time.sleep(0.1)
    assert json.loads((tmp_path / "runs/long/result.json").read_text())["status"] == "preempted"


def test_a_run_directory_has_one_writer(tmp_path, run_llmkit):
    driver = start(tmp_path, "name=long", *LONG)
    wait_for_steps(tmp_path / "runs/long/metrics.jsonl", 1)

    second = run_llmkit("train", "name=long", *LONG)

    driver.terminate()
    driver.communicate(timeout=60)
    assert second.returncode == 2
    assert f"runs/long is in use by process {driver.pid}" in second.stderr


@pytest.mark.parametrize(("words", "seen"), [(("-m", "seed=1,2"), ["3", "5"]), (("seed=1",), ["3"])])
def test_every_job_and_every_single_run_is_given_one_visible_gpu(run_llmkit, tmp_path, words, seen):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def see(event, words):\n"
        "    if event == 'open' and str(words[0]).endswith('loss.png'):\n"
        "        with open(os.environ['SEEN'], 'a') as file:\n"
        "            file.write(f\"{os.getpid()}:{os.environ['CUDA_VISIBLE_DEVICES']}\\n\")\n"
        "sys.addaudithook(see)\n"
    )
    env = {"CUDA_VISIBLE_DEVICES": "3,5", "SEEN": str(tmp_path / "seen"), "PYTHONPATH": f"{tmp_path}:{CHECKOUT}"}

    done = run_llmkit("train", *words, "name=two", "training.max_steps=1", "evaluation=off", env=env)

    assert done.returncode == 0, done.stderr
    workers = set((tmp_path / "seen").read_text().split())
    assert sorted(worker.partition(":")[2] for worker in workers) == seen


def test_a_run_imports_no_optional_library_that_it_does_not_use(run_llmkit):
    done = run_llmkit("train", "training.max_steps=1", "evaluation=off", env={"PYTHONPROFILEIMPORTTIME": "1"})

    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert {"torch", "trl", "peft"} <= imported
    unused = ("bitsandbytes.", "wandb.", "deepspeed.", "vllm.", "ray.", "mistral_common.")  # with a part of theirs
    assert [name for name in imported if name.startswith(unused)] == []
