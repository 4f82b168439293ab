"""`launcher=ray` on a real Ray of two nodes: sweeps, shares of a node, several nodes, and nodes that die."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from ray_cluster import CPUS, RayCluster
from run_records import steps_of, sweep_of, wait_for_steps
from slurm_cluster import free_ports, wait_until

from llmkit.config import save
from llmkit.launchers.job_record import ENDED, RUNNING, JobRecord

CHECKOUT = Path(__file__).parents[2]
FAST = ("training.max_steps=4", "evaluation=off", "training.logging_steps=1")
LONG = ("training.max_steps=100000", "evaluation=off", "training.logging_steps=1", "training.eval_steps=1000000")
CPU = "hardware.device=cpu"
BATCH = "training.global_batch_size=16"


@pytest.fixture
def on_ray(ray_cluster: RayCluster):
    """The words that choose the cluster; afterwards nothing of ours is left on it, and both nodes are there."""
    address = f"launcher.address={ray_cluster.address}"
    yield ("launcher=ray", address, "launcher.poll_s=1", "launcher.preflight=false", CPU)
    idle = {"nodes": 2, "jobs": [], "groups": 0, "free": 2 * CPUS}
    try:
        ray_cluster.heal()
        wait_until(lambda: ray_cluster.state() == idle, lambda: str(ray_cluster.state()), 120)
    except Exception:
        ray_cluster.restart()  # else every later test would fail of this one
        raise


@pytest.fixture
def start(tmp_path):
    """A function that starts a driver and leaves it alone; what is left is ended with the test."""
    drivers = []

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "llmkit", "train", *words]
        env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
        drivers.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate()


def job_of(run_dir: Path) -> dict:
    path = run_dir / "job.json"
    return json.loads(path.read_text()) if path.exists() else {"state": None}


def result_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def node_of(cluster: RayCluster, run_dir: Path) -> str:
    """The node whose processes run a run."""
    process = job_of(run_dir)["process"]
    (name,) = (name for name in cluster.names() if process in {one.pid for one in cluster.processes_on(name)})
    return name


@pytest.mark.slow
def test_a_sweep_ends_ranked_as_on_this_machine_and_a_failed_job_hides_nothing(
    on_ray, run_llmkit, tmp_path, chats_file
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    more = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "?"}]} for n in range(8)
    ]
    files = f"data.path={chats_file()},{bad},{chats_file(*more, name='more.jsonl')}"
    words = ("train", "-m", files, "data.validation=0.25", *FAST)

    done = run_llmkit(*words, *on_ray, "name=there")
    here = run_llmkit(*words, CPU, "name=here")

    assert (done.returncode, here.returncode) == (1, 1), done.stdout + done.stderr
    there, local = sweep_of(tmp_path / "runs/there"), sweep_of(tmp_path / "runs/here")
    assert [job["status"] for job in there] == ["completed", "failed", "completed"]
    assert f"{bad}, line 1: not JSON" in there[1]["error"]
    for one, other in zip(there[::2], local[::2], strict=True):
        assert one["objective"] == pytest.approx(other["objective"], abs=1e-4)
    tables = [
        [line for line in output[output.index("ranked by eval_loss") :].splitlines() if "│" in line]
        for output in (done.stdout, here.stdout)
    ]
    assert tables[0] == tables[1]
    assert "ray::" not in done.stdout + done.stderr  # none of Ray's own words
    assert "INFO" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_sweep_goes_on_when_a_node_dies(on_ray, ray_cluster, start, tmp_path):
    words = ("training.max_steps=300", "training.save_steps=10", "evaluation=off", "training.logging_steps=1")
    driver = start(*on_ray, f"launcher.num_cpus={CPUS}", *words, "-m", "lora.r=2,4", "name=moved")
    runs = [tmp_path / "runs/moved" / name for name in ("r=2", "r=4")]
    for run_dir in runs:
        wait_for_steps(run_dir, 15)
    (lost,) = (run_dir for run_dir in runs if node_of(ray_cluster, run_dir) == "second")

    ray_cluster.kill_node("second")
    before = steps_of(lost)
    output = driver.communicate(timeout=400)[0]

    assert driver.returncode == 0, output
    assert [job["status"] for job in sweep_of(tmp_path / "runs/moved")] == ["completed"] * 2
    assert {job_of(run_dir)["starts"] for run_dir in runs} == {1, 2}
    for run_dir in runs:
        assert steps_of(run_dir) == list(range(1, 301))
    log = (lost / "console.log").read_text()
    assert "a new run" not in log[log.index(f"step {before[-1]}/") :]  # it went on from its checkpoint


@pytest.mark.slow
def test_a_run_that_loses_its_node_too_often_ends_and_says_so(on_ray, ray_cluster, start, tmp_path):
    driver = start(*on_ray, "launcher.max_retries=0", "launcher.resources={second: 1}", *LONG, "name=unlucky")
    run_dir = tmp_path / "runs/unlucky"
    wait_for_steps(run_dir, 1)

    ray_cluster.kill_node("second")
    ray_cluster.heal()
    output = driver.communicate(timeout=300)[0]

    assert driver.returncode == 1, output
    assert "its node was lost once more than launcher.max_retries=0 allows" in output
    assert job_of(run_dir)["starts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("half", "gpus"),
    [("launcher.num_gpus=0.5", "0"), ("launcher.resources={second: 0.5}", "")],
    ids=["GPU", "resource"],
)
def test_jobs_share_what_they_ask_parts_of(on_ray, ray_cluster, run_llmkit, tmp_path, half, gpus):
    queued = run_llmkit("train", *on_ray, half, "launcher.wait=false", *LONG, "-m", "lora.r=2,4,8", "name=half")
    assert queued.returncode == 0, queued.stderr
    runs = [tmp_path / "runs/half" / name for name in ("r=2", "r=4", "r=8")]

    for run_dir in runs[:2]:
        wait_for_steps(run_dir, 1)
    states = [job_of(run_dir)["state"] for run_dir in runs]
    nodes = {node_of(ray_cluster, run_dir) for run_dir in runs[:2]}
    visible = {psutil.Process(job_of(run_dir)["process"]).environ()["CUDA_VISIBLE_DEVICES"] for run_dir in runs[:2]}
    listed = run_llmkit("jobs")
    cancelled = run_llmkit("jobs", "cancel", "half")

    assert states == ["running", "running", "queued"]
    assert (nodes, visible) == ({"second"}, {gpus})
    assert [listed.stdout.count(f" {word} ") for word in ("running", "queued")] == [2, 1], listed.stdout
    assert cancelled.returncode == 0, cancelled.stderr
    for run_dir in runs[:2]:
        wait_until(lambda run_dir=run_dir: job_of(run_dir)["state"] == "ended", "a cancelled run does not end", 60)
        assert result_of(run_dir)["status"] == "preempted"
        assert list((run_dir / "checkpoints").glob("step-*/MANIFEST.json"))
    collected = run_llmkit("jobs", "collect", "half")
    assert collected.returncode == 75
    assert [job["status"] for job in sweep_of(tmp_path / "runs/half")] == ["preempted", "preempted", "stopped"]


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 1)], ids=["one node", "two nodes"])
def test_several_processes_train_in_one_bundle_each_node(on_ray, ray_cluster, start, tmp_path, nodes, processes):
    words = (f"hardware.num_nodes={nodes}", f"hardware.num_processes={processes}", BATCH, "training.max_steps=60")
    driver = start(*on_ray, *words, "evaluation=off", "training.logging_steps=1", "name=ranks")
    run_dir = tmp_path / "runs/ranks"
    wait_for_steps(run_dir, 1)
    busy = [
        sum("llmkit.node" in process.cmdline() for process in ray_cluster.processes_on(name))
        for name in ray_cluster.names()
    ]
    output = driver.communicate(timeout=300)[0]

    assert driver.returncode == 0, output
    assert (result_of(run_dir)["status"], result_of(run_dir)["engine"]) == ("completed", "ddp")
    assert steps_of(run_dir) == list(range(1, 61))
    assert sorted(busy) == ([1, 1] if nodes == 2 else [0, 1])


@pytest.mark.slow
def test_a_job_of_two_nodes_goes_on_when_one_of_them_dies_and_comes_back(on_ray, ray_cluster, start, tmp_path):
    words = ("hardware.num_nodes=2", BATCH, "training.max_steps=200", "training.save_steps=10")
    driver = start(*on_ray, *words, "evaluation=off", "training.logging_steps=1", "name=pair")
    run_dir = tmp_path / "runs/pair"
    wait_for_steps(run_dir, 15)

    ray_cluster.kill_node("second")
    ray_cluster.heal()
    output = driver.communicate(timeout=400)[0]

    assert driver.returncode == 0, output
    assert job_of(run_dir)["starts"] == 2
    assert steps_of(run_dir) == list(range(1, 201))


@pytest.mark.slow
def test_a_failed_job_of_two_nodes_ends_with_its_reason(on_ray, run_llmkit, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")

    done = run_llmkit("train", *on_ray, "hardware.num_nodes=2", BATCH, f"data.path={bad}", "name=failed")

    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{bad}, line 1: not JSON" in done.stdout
    assert job_of(tmp_path / "runs/failed")["starts"] == 1


@pytest.mark.slow
def test_jobs_of_two_nodes_are_cancelled_while_they_wait_and_while_they_run(on_ray, run_llmkit, tmp_path):
    whole_nodes = ("hardware.num_nodes=2", f"launcher.num_cpus={CPUS}", BATCH, "launcher.wait=false")
    runs, waits = (tmp_path / "runs" / name for name in ("runs", "waits"))
    for run_dir in (runs, waits):
        queued = run_llmkit("train", *on_ray, *whole_nodes, *LONG, f"name={run_dir.name}")
        assert queued.returncode == 0, queued.stderr
    wait_for_steps(runs, 1)
    states = [job_of(run_dir)["state"] for run_dir in (runs, waits)]

    cancelled = [run_llmkit("jobs", "cancel", run_dir.name) for run_dir in (waits, runs)]

    assert states == ["running", "queued"]
    assert [done.returncode for done in cancelled] == [0, 0], cancelled
    wait_until(lambda: job_of(runs)["state"] == "ended", "the cancelled run does not end", 60)
    assert result_of(runs)["status"] == "preempted"
    assert not (waits / "metrics.jsonl").exists()


def test_a_job_that_has_ended_is_not_run_again_where_its_actor_is_started_again(compose, tmp_path, monkeypatch):
    from llmkit.launchers.ray_job import RayJob

    save(compose("launcher=ray", *FAST), tmp_path)
    ended = JobRecord(launcher="ray", job_id="job@127.0.0.1:1", state=ENDED, exit_code=0, starts=3)
    ended.write(tmp_path)
    left = threading.Event()
    monkeypatch.setattr(RayJob, "_leave", lambda job: left.set())

    job = RayJob("job", str(tmp_path), nodes=1, max_retries=0, options={})

    assert left.wait(10)
    assert JobRecord.read(tmp_path) == ended
    assert job.here is None


def test_a_job_that_ends_while_its_scheduler_is_asked_has_said_why(tmp_path):
    from llmkit.launchers.cluster import changes

    record = JobRecord(launcher="ray", job_id="job@127.0.0.1:1", state=RUNNING)
    record.write(tmp_path)

    class Ray:
        def seen(self, job_ids):
            record.state, record.exit_code, record.ended = ENDED, 1, "its node was lost"
            record.write(tmp_path)
            return {}

    ((_, seen),) = changes(Ray(), [tmp_path], poll=1)

    assert (seen.state, seen.detail) == (ENDED, "its node was lost")


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_to_itself_and_the_same_command_finds_it(on_ray, start, run_llmkit, tmp_path):
    driver = start(*on_ray, *LONG, "name=left")
    run_dir = tmp_path / "runs/left"
    wait_for_steps(run_dir, 1)

    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=60)[0]

    assert driver.returncode == 130
    assert "detached: the jobs go on." in output
    seen = len(steps_of(run_dir))
    wait_for_steps(run_dir, seen + 5)
    again = start(*on_ray, *LONG, "name=left")
    assert again.stdout is not None
    assert f"job     {job_of(run_dir)['job_id']} runs runs/left already (running)" in again.stdout.readline()
    assert run_llmkit("jobs", "cancel", "left").returncode == 0
    rest = again.communicate(timeout=100)[0]
    assert again.returncode == 75, rest
    assert job_of(run_dir)["starts"] == 1


@pytest.mark.slow
def test_a_cluster_is_used_from_a_machine_outside_it(on_ray, ray_cluster, run_llmkit, tmp_path):
    outside = f"launcher.address={ray_cluster.client_address}"

    done = run_llmkit("train", *on_ray, outside, *FAST, "name=outside")

    assert done.returncode == 0, done.stdout + done.stderr
    assert job_of(tmp_path / "runs/outside")["job_id"].endswith(f"@{ray_cluster.client_address}")


@pytest.mark.slow
def test_a_ray_of_the_commands_own_runs_a_sweep_and_ends_with_it(ray_token, run_llmkit, tmp_path):
    words = ("launcher=ray", "launcher.address=local", "launcher.poll_s=1", "launcher.preflight=false")

    done = run_llmkit("train", *words, *FAST, "-m", "lora.r=2,4", "name=own")

    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [job_of(tmp_path / "runs/own" / name) for name in ("r=2", "r=4")]
    assert [job["exit_code"] for job in jobs] == [0, 0]
    (port,) = {job["job_id"].rpartition(":")[2] for job in jobs}
    assert not answers(int(port))


@pytest.mark.slow
def test_runs_of_a_commands_own_ray_save_when_it_is_killed(ray_token, run_llmkit, start, tmp_path):
    words = ("launcher=ray", "launcher.address=local", "launcher.poll_s=1", "launcher.preflight=false")
    driver = start(*words, *LONG, "name=own")
    run_dir = tmp_path / "runs/own"
    wait_for_steps(run_dir, 3)

    driver.kill()
    wait_until((run_dir / "result.json").exists, "the run goes on", 100)

    assert result_of(run_dir)["status"] == "preempted"
    listed = run_llmkit("jobs")
    assert " preempted " in listed.stdout, listed.stdout


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_the_message_of_a_cluster_that_wants_another_token_says_where_it_goes(on_ray, run_llmkit, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)

    done = run_llmkit("train", *on_ray, env={"RAY_AUTH_TOKEN_PATH": str(wrong)})

    assert done.returncode == 2
    assert "cannot be used from here" in done.stderr
    assert "one with a token wants RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in done.stderr


def test_a_cluster_that_does_not_answer_is_named(run_llmkit, tmp_path):
    (port,) = free_ports(1)

    done = run_llmkit("train", "launcher=ray", f"launcher.address=127.0.0.1:{port}")

    assert done.returncode == 2
    assert f"launcher.address=127.0.0.1:{port}: nothing answers at 127.0.0.1:{port}." in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_of_a_cluster_that_is_gone_names_the_way_out_and_takes_it(run_llmkit, compose, tmp_path):
    gone, other = free_ports(2)
    run_dir = tmp_path / "runs/left"
    run_dir.mkdir(parents=True)
    save(compose("launcher=ray", f"launcher.address=127.0.0.1:{gone}", *FAST), run_dir)
    JobRecord(launcher="ray", job_id=f"none@127.0.0.1:{gone}", state=RUNNING).write(run_dir)
    words = ("train", "launcher=ray", f"launcher.address=127.0.0.1:{other}", *FAST, "name=left")

    held = run_llmkit(*words)
    given_up = run_llmkit("jobs", "cancel", "left", "gone=true")
    free = run_llmkit(*words)

    assert held.returncode == 1
    assert f"nothing answers at 127.0.0.1:{gone}." in held.stderr
    assert "llmkit jobs cancel runs/left gone=true" in held.stderr
    assert given_up.returncode == 0, given_up.stderr
    assert job_of(run_dir)["state"] == "ended"
    assert f"nothing answers at 127.0.0.1:{other}." in free.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [(), ("-m", "lora.r=2,4")], ids=["run", "sweep"])
@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (("launcher.num_gpus=2", "hardware.num_processes=2"), "a node with CPU 2, GPU 2"),
        (("launcher.num_cpus=64",), "a node with CPU 64"),
        (("launcher.resources={license: 1}",), "a node with CPU 1, license 1"),
        (("hardware.num_nodes=3",), "3 nodes with CPU 1 each"),
    ],
    ids=["GPUs", "CPUs", "resources", "nodes"],
)
def test_what_no_node_has_is_refused_with_what_there_is(on_ray, run_llmkit, tmp_path, words, needs, sweep):
    done = run_llmkit("train", *on_ray, *words, *sweep)

    assert done.returncode == 2
    assert f"the run needs {needs}, and this cluster has 1 node with CPU {CPUS}, GPU 1, memory" in done.stderr
    assert not list((tmp_path / "runs").glob("**/config.yaml"))


@pytest.mark.slow
def test_of_a_sweep_over_sizes_each_is_compared_with_what_there_is(on_ray, run_llmkit, tmp_path):
    done = run_llmkit("train", *on_ray, BATCH, "-m", "hardware.num_processes=4,1", "name=sizes")

    assert done.returncode == 2, done.stdout
    assert "the run needs a node with CPU 4, and this cluster has" in done.stderr
    assert not list((tmp_path / "runs").glob("**/config.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("launcher.address=http://10.0.0.1:8265",), "launcher.address=http://10.0.0.1:8265: auto, local, HOST:PORT"),
        (("launcher.address=atuo",), "Did you mean 'auto'?"),
        (("launcher.address=local", "launcher.wait=false"), "ends with this command"),
        (("launcher.num_gpus=2",), "launcher.num_gpus=2: a process takes one GPU"),
        (("launcher.num_gpus=0.5", "hardware.num_processes=2"), "launcher.num_gpus=0.5: a process takes one GPU"),
        (("launcher.resources={GPU: 1}",), "launcher.resources.GPU: is launcher.num_gpus."),
        (("launcher.placement_strategy=FAR",), "must be one of STRICT_SPREAD, SPREAD, PACK"),
        (("launcher.partition=gpu",), "launcher.partition: the chosen launcher has no such setting"),
    ],
)
def test_what_ray_would_not_understand_is_refused(run_llmkit, words, message):
    done = run_llmkit("train", "launcher=ray", *words)

    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("words", "gpus_there", "need"),
    [
        ((), True, {"CPU": 1, "GPU": 1}),
        ((), False, {"CPU": 1, "GPU": 0}),
        (("hardware.num_processes=4", "launcher.num_cpus=32"), True, {"CPU": 32, "GPU": 4}),
        (("launcher.num_gpus=0.25", "launcher.mem_gb=1.5"), True, {"CPU": 1, "GPU": 0.25, "memory": 1.5e9}),
        (("hardware.device=cpu", "launcher.resources={license: 1}"), True, {"CPU": 1, "GPU": 0, "license": 1}),
    ],
)
def test_a_run_takes_a_gpu_for_each_process_where_there_are_any(compose, words, gpus_there, need):
    from llmkit.launchers.ray import resources

    assert resources(compose("launcher=ray", *words), gpus_there=gpus_there) == need


def test_without_ray_the_message_says_how_to_install_it(run_llmkit, tmp_path):
    code = "import sys; sys.modules['ray'] = None; from llmkit.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "launcher=ray"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "launcher=ray needs Ray, which is not installed: make" in done.stderr
