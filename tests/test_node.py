"""The processes of a run on a machine: signals reach all of them, and the first that fails is heard, once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ports import free_port

from llmkit import rundir
from llmkit.training.checkpoints import manifest
from llmkit.training.metrics import read_metrics

CHECKOUT = Path(__file__).parents[1]
TWO = ["hardware=cpu", "hardware.num_processes=2", "evaluation=off"]

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """A function that starts `llmkit train`; what still runs at the end is killed."""
    started = []

    def start(*words: str, env: dict[str, str] | None = None):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmkit.train", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT)} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for one in family:
            one.kill()
        process.communicate()  # closes its pipe, too


def wait_for(what, seconds=120):
    """Wait until `what()` is true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := what():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come")


def at_step(run_dir, step):
    return any(record.get("step", 0) >= step and "loss" in record for record in read_metrics(run_dir))


def ranks_of(driver):
    """The processes that train, by their rank."""
    found = {}
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if "RANK" in environment and "LLMKIT_RANKS" in environment:
            found[int(environment["RANK"])] = process
    return found


LONG = ["training.max_steps=2000", "training.logging_steps=1", "training.global_batch_size=4", "name=alpha"]


def test_a_signal_stops_all_processes_at_one_saved_step_and_the_run_goes_on(start, tmp_path, run_llmkit):
    driver, run = start(*TWO, *LONG), tmp_path / "runs/alpha"
    wait_for(lambda: at_step(run, 3))

    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 75, said
    assert rundir.read_result(run)["status"] == "preempted"
    step = manifest.step_of(manifest.latest(run))
    assert f"at step {step}, saved" in said
    assert "Traceback" not in said

    done = run_llmkit("resume", run, f"training.max_steps={step + 2}", "resume_allow=[training.max_steps]")

    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read_metrics(run) if "loss" in r][-2:] == [step + 1, step + 2]


def test_a_signal_that_comes_before_the_processes_do_stops_them_too(start, tmp_path):
    driver, run = start(*TWO, *LONG), tmp_path / "runs/alpha"
    wait_for(lambda: (run / rundir.RANKS).exists())  # the last thing before signals are heeded

    time.sleep(0.5)
    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 75, said
    result = rundir.read_result(run)
    assert result["status"] in ("stopped", "preempted")
    if result["status"] == "stopped":  # by this machine's process, or by the driver for one that had just begun
        assert "stopped by SIGTERM" in result["error"] or "ended at once" in result["error"]
    assert "Traceback" not in said


def test_a_stop_while_the_data_is_prepared_says_so_and_leaves_a_result(start, tmp_path):
    text = "\n".join('{"prompt": "' + "word " * 30 + str(n) + '", "completion": "yes"}' for n in range(200_000))
    (tmp_path / "many.jsonl").write_text(text)
    driver, run = start(*TWO, *LONG, "data.path=many.jsonl", "data.validation=null"), tmp_path / "runs/alpha"
    wait_for(lambda: len(ranks_of(driver)) == 2 and (run / rundir.RANKS / "rank-1.log").exists())
    time.sleep(3)  # they read by now

    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 75, said
    result = rundir.read_result(run)
    assert result["status"] == "stopped"
    assert "stopped by SIGTERM" in result["error"]
    assert said.count("stopped by SIGTERM") == 1


def test_a_machine_that_waits_for_another_ends_when_it_is_told_to(start, tmp_path):
    machines = ["hardware.num_nodes=2", f"hardware.rendezvous=127.0.0.1:{free_port()}"]
    driver = start("hardware=cpu", "evaluation=off", *LONG, *machines, "hardware.node_rank=0")
    wait_for(lambda: (tmp_path / "runs/alpha" / rundir.RANKS).exists())
    time.sleep(5)

    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)

    assert driver.returncode == 75, said
    assert "waiting for all 2 at 127.0.0.1" in said
    assert "stopped by SIGINT before its processes had started" in said
    assert rundir.read_result(tmp_path / "runs/alpha")["status"] == "stopped"


def test_a_taken_port_is_named(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        driver = start(
            "hardware=cpu", *LONG, "hardware.num_nodes=2", f"hardware.rendezvous={place}", "hardware.node_rank=0"
        )
        said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 1
    assert f"error: hardware.rendezvous={place}: the machines did not find one another there" in said
    assert "Traceback" not in said


def test_the_second_machine_may_be_started_first(start, tmp_path):
    machines = ["hardware.num_nodes=2", f"hardware.rendezvous=127.0.0.1:{free_port()}"]
    words = ["hardware=cpu", "evaluation=off", "name=alpha", "training.max_steps=2", *machines]
    second = start(*words, "hardware.node_rank=1")
    wait_for(lambda: (tmp_path / "runs/alpha" / rundir.RANKS / "node-1").exists())
    time.sleep(2)
    first = start(*words, "hardware.node_rank=0")

    assert first.wait(timeout=200) == 0, first.communicate()[0]
    assert second.wait(timeout=60) == 0


def test_more_processes_than_gpus_are_refused_by_the_machine_that_lacks_them(start, tmp_path):
    driver = start("hardware=h100", "hardware.num_processes=2", "name=alpha")
    said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 2
    assert "hardware.num_processes=2" in said
    assert "use hardware=cpu" in said


def test_a_driver_that_is_killed_takes_no_step_with_it(start, tmp_path):
    driver, run = start(*TWO, *LONG), tmp_path / "runs/alpha"
    wait_for(lambda: at_step(run, 3))
    ranks = ranks_of(driver)
    assert sorted(ranks) == [0, 1]

    driver.kill()

    wait_for(lambda: not any(process.is_running() for process in ranks.values()))
    result = wait_for(lambda: rundir.read_result(run))
    assert result["status"] == "preempted"
    assert manifest.step_of(manifest.latest(run)) == result["steps"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_run_with_one_message(rank, start, tmp_path):
    driver, run = start(*TWO, *LONG), tmp_path / "runs/alpha"
    wait_for(lambda: at_step(run, 3))

    ranks_of(driver)[rank].kill()
    said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 1
    assert f"error: rank {rank} was ended by SIGKILL" in said
    assert "Traceback" not in said
    assert "ChildFailedError" not in said


def test_what_only_one_process_meets_is_said_once_with_its_rank(start, tmp_path):
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and 'LLMKIT_RANKS' in os.environ:\n"
        "    import llmkit.training.ranks as ranks\n"
        "    def fail(config):\n"
        "        raise MemoryError('no room on this one')\n"
        "    ranks.agree = fail\n"
    )
    driver = start(*TWO, "name=alpha", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUT}"})

    said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 1
    assert said.count("error: ") == 1
    assert "error: rank 1: " in said
    assert "no room on this one" in rundir.read_result(tmp_path / "runs/alpha")["error"]


def test_wrong_data_is_one_message_and_leaves_nothing(start, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"unknown": 1}) + "\n")

    driver = start(*TWO, "data=jsonl", "data.path=rows.jsonl", "name=alpha")
    said, _ = driver.communicate(timeout=120)

    assert driver.returncode == 2
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "runs/alpha").exists()


def test_more_processes_than_gpus_are_refused(start, tmp_path):
    driver = start("hardware=h100", "hardware.num_processes=4", "name=alpha", env={"CUDA_VISIBLE_DEVICES": "0,1"})
    said, _ = driver.communicate(timeout=60)

    assert driver.returncode == 2
    assert "hardware.num_processes=4: there are 2 GPUs" in said
    assert not (tmp_path / "runs/alpha").exists()


def test_two_machines_train_one_model(start, tmp_path):
    words = ["hardware=cpu", "hardware.num_nodes=2", f"hardware.rendezvous=127.0.0.1:{free_port()}", "evaluation=off"]
    words += ["training.max_steps=4", "training.logging_steps=1", "name=alpha"]
    first = start(*words, "hardware.node_rank=0")
    run = tmp_path / "runs/alpha"
    command = wait_for(lambda: re.search(r"machine 2 of 2: llmkit train (.*)", first.stdout.readline()))[1].split()

    second = start(*command)
    said, _ = second.communicate(timeout=120)
    also_said, _ = first.communicate(timeout=120)

    assert second.returncode == 0, said
    assert first.returncode == 0, also_said
    assert "engine     ddp, 2 processes" in also_said
    assert rundir.read_result(run)["status"] == "completed"
    assert (run / rundir.FINAL / "adapter_model.safetensors").exists()
