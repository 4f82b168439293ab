"""`launcher=slurm` on a real Slurm of two nodes: sweeps, failures, preemption, and nodes that die."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_records import steps_of, sweep_of, wait_for_steps
from slurm_cluster import SlurmCluster, wait_until

CHECKOUT = Path(__file__).parents[2]
FAST = ("training.max_steps=4", "evaluation=off", "training.logging_steps=1")
SLURM = ("launcher=slurm", "launcher.poll_s=1", "launcher.cpus_per_task=1", "launcher.preflight=false")
LONG = ("training.max_steps=100000", "evaluation=off", "training.logging_steps=1", "training.eval_steps=1000000")

CPU, CUDA, IMAGE = "hardware.device=cpu", "hardware.device=cuda", "launcher.container=image.sif"
# In place of apptainer: it runs the command without a container, but where none of Slurm's commands is found.
APPTAINER = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != image.sif ]; do shift; done
shift
PATH={path} exec "$@"
"""


def job_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "job.json").read_text())


def start(slurm: SlurmCluster, tmp_path: Path, *words: str) -> subprocess.Popen:
    """A driver that is left alone while the test does something to its jobs."""
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)} | slurm.environment
    command = [sys.executable, "-m", "llmkit", "train", *words]
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_sweep_ends_ranked_as_on_this_machine(slurm: SlurmCluster, run_llmkit, tmp_path):
    words = ("train", "-m", "lora.r=2,4", *FAST)

    done = run_llmkit(*words, *SLURM, "name=there", env=slurm.environment)
    here = run_llmkit(*words, "name=here")

    assert done.returncode == 0, done.stdout + done.stderr
    there, local = sweep_of(tmp_path / "runs/there"), sweep_of(tmp_path / "runs/here")
    assert [job["status"] for job in there] == ["completed"] * 2
    assert [job["objective"] for job in there] == pytest.approx([job["objective"] for job in local], abs=1e-4)
    ids = [job_of(tmp_path / "runs/there" / name)["job_id"] for name in ("r=2", "r=4")]
    assert [job_id.partition("_")[2] for job_id in ids] == ["0", "1"]  # of one array
    tables = [
        [line for line in output[output.index("ranked by eval_loss") :].splitlines() if "│" in line]
        for output in (done.stdout, here.stdout)
    ]
    assert tables[0] == tables[1]
    assert f"best: {max(there, key=lambda job: -job['objective'])['run_dir']}/final" in done.stdout


def test_a_job_that_is_behind_those_before_it_stops_early_and_is_no_failure(slurm: SlurmCluster, run_llmkit, tmp_path):
    words = ("early_stop=halving", "early_stop.min_steps=2", "launcher.array_parallelism=1", *FAST)
    rates = ("-m", "training.learning_rate=1e-2,1e-5", "name=half")

    done = run_llmkit("train", *SLURM, *words, *rates, env=slurm.environment)

    assert done.returncode == 0, done.stdout + done.stderr
    first, second = sweep_of(tmp_path / "runs/half")
    assert (first["status"], second["status"]) == ("completed", "stopped")
    assert second["error"] == "early_stop=halving: place 2 of 2 at step 2"
    assert job_of(Path(tmp_path / second["run_dir"]))["exit_code"] == 0


def test_one_failed_job_hides_nothing(slurm: SlurmCluster, run_llmkit, tmp_path, chats_file):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    words = ("-m", f"data.path={chats_file()},{bad}", "data.validation=null", "name=two", *FAST)

    done = run_llmkit("train", *SLURM, *words, env=slurm.environment)

    assert done.returncode == 1
    good, failed = sweep_of(tmp_path / "runs/two")
    assert (good["status"], failed["status"]) == ("completed", "failed")
    assert f"{bad}, line 1: not JSON" in failed["error"]
    assert f"{bad}, line 1: not JSON" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", ["USR2", "TERM"])
def test_a_preempted_run_saves_is_queued_again_and_ends_as_if_undisturbed(
    slurm: SlurmCluster, run_llmkit, tmp_path, number
):
    words = ("training.max_steps=120", "evaluation=off", "training.logging_steps=1", "training.eval_steps=1000")
    threads = {"OMP_NUM_THREADS": "1"}
    undisturbed = run_llmkit("train", *words, "name=undisturbed", env=threads)
    assert undisturbed.returncode == 0, undisturbed.stderr

    driver = start(slurm, tmp_path, *SLURM, *words, "name=preempted")
    run_dir = tmp_path / "runs/preempted"
    wait_for_steps(run_dir, 5)
    slurm.ask("scancel", f"--signal={number}", job_of(run_dir)["job_id"])
    output = driver.communicate(timeout=300)[0]

    assert driver.returncode == 0, output
    assert f"by SIG{number} at step" in output
    assert "queued  runs/preempted" in output[output.index(f"by SIG{number}") :]
    job = job_of(run_dir)
    assert (job["starts"], job["state"], job["exit_code"]) == (2, "ended", 0)
    assert steps_of(run_dir) == list(range(1, 121))
    weights = "final/adapter_model.safetensors"
    assert (run_dir / weights).read_bytes() == (tmp_path / "runs/undisturbed" / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("preempted", "other"), [("r=2", "r=4"), ("r=4", "r=2")], ids=["first", "last"])
def test_one_preempted_job_of_a_sweep_is_queued_again_alone(slurm: SlurmCluster, tmp_path, preempted, other):
    driver = start(slurm, tmp_path, *SLURM, *LONG, "-m", "lora.r=2,4", "name=s")
    directory = tmp_path / "runs/s"
    for name in (preempted, other):
        wait_for_steps(directory / name, 5)
    job_id = job_of(directory / preempted)["job_id"]

    slurm.ask("scancel", "--signal=USR2", job_id)
    wait_until(lambda: job_of(directory / preempted)["starts"] == 2, slurm.told, 180)
    states = slurm.states()
    slurm.ask("scancel", job_id.partition("_")[0])
    output = driver.communicate(timeout=300)[0]

    assert list(states.values()) == ["RUNNING"] * 2
    assert job_of(directory / other)["starts"] == 1
    assert driver.returncode == 75, output
    assert [job["status"] for job in sweep_of(directory)] == ["preempted"] * 2
    steps = steps_of(directory / preempted)
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.slow
def test_a_run_that_slurm_itself_queues_again_is_followed_and_not_queued_twice(slurm: SlurmCluster, tmp_path):
    words = (*SLURM, *LONG, "name=again")
    driver = start(slurm, tmp_path, *words)
    run_dir = tmp_path / "runs/again"
    wait_for_steps(run_dir, 5)
    job_id = job_of(run_dir)["job_id"]

    slurm.ask("scontrol", "requeue", job_id)
    wait_until(lambda: job_of(run_dir)["state"] != "running", "the run does not save and end", 60)
    second = start(slurm, tmp_path, *words)
    assert second.stdout is not None
    attached = second.stdout.readline()
    saved = len(steps_of(run_dir))
    wait_for_steps(run_dir, saved + 5)
    slurm.ask("scancel", job_id)
    outputs = [one.communicate(timeout=300)[0] for one in (driver, second)]

    assert f"job     {job_id} runs runs/again already" in attached
    assert [driver.returncode, second.returncode] == [75, 75], outputs
    assert (job_of(run_dir)["job_id"], job_of(run_dir)["starts"]) == (job_id, 2)
    assert "by SIGTERM at step" in outputs[0]
    assert steps_of(run_dir) == list(range(1, steps_of(run_dir)[-1] + 1))


@pytest.fixture
def container(monkeypatch, tmp_path) -> Path:
    """What the container runtime was told to start."""
    programs, log = tmp_path / "programs", tmp_path / "apptainer.log"
    programs.mkdir()
    program = programs / "apptainer"
    program.write_text(APPTAINER.format(log=log, path=Path(sys.executable).parent))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.slow
@pytest.mark.parametrize("inside", [(), (IMAGE, f"launcher.python={sys.executable}")], ids=["bare", "container"])
def test_a_run_on_two_nodes_is_one_group_and_goes_on_as_one_after_a_preemption(
    slurm: SlurmCluster, tmp_path, container, inside
):
    words = ("hardware.num_nodes=2", CPU, "training.max_steps=60", "evaluation=off", *inside)
    driver = start(slurm, tmp_path, *SLURM, *words, "training.logging_steps=1", "name=wide")
    run_dir = tmp_path / "runs/wide"
    wait_for_steps(run_dir, 5)
    job_id = job_of(run_dir)["job_id"]
    nodes = slurm.ask("squeue", "-h", "-j", job_id, "-o", "%N")
    slurm.ask("scancel", "--signal=USR2", job_id)
    output = driver.communicate(timeout=400)[0]

    assert driver.returncode == 0, output
    assert nodes == "node[1-2]"
    assert job_of(run_dir)["starts"] == 2
    assert steps_of(run_dir) == list(range(1, 61))
    started = f"exec image.sif {sys.executable} -u -m submitit.core._submit {run_dir / 'slurm'}"
    assert container.exists() == bool(inside)
    assert not inside or container.read_text().splitlines() == [started] * 4  # two nodes, twice


@pytest.mark.slow
def test_a_run_on_a_node_that_dies_goes_on_from_its_checkpoint_on_another(slurm: SlurmCluster, tmp_path):
    words = ("training.max_steps=300", "training.save_steps=10", "evaluation=off", "training.logging_steps=1")
    driver = start(slurm, tmp_path, *SLURM, *words, "name=moved")
    run_dir = tmp_path / "runs/moved"
    wait_for_steps(run_dir, 15)
    first = job_of(run_dir)["host"]

    slurm.kill_node(first)
    try:
        output = driver.communicate(timeout=400)[0]
    finally:
        slurm.start_node(first)

    assert driver.returncode == 0, output
    job = job_of(run_dir)
    assert (job["starts"], job["state"]) == (2, "ended")
    assert job["host"] != first
    assert steps_of(run_dir) == list(range(1, 301))
    assert "a new run" not in output[output.index("queued  ", 10) :]


@pytest.mark.slow
def test_a_run_that_goes_on_after_its_node_was_given_up_is_not_run_twice(slurm: SlurmCluster, tmp_path):
    driver = start(slurm, tmp_path, *SLURM, *LONG[1:], "training.max_steps=1200", "name=silent")
    run_dir = tmp_path / "runs/silent"
    wait_for_steps(run_dir, 3)
    job = job_of(run_dir)

    slurm.kill_daemon(job["host"])
    try:
        wait_until(lambda: "Restarts=1" in slurm.ask("scontrol", "-o", "show", "job", job["job_id"]), slurm.told, 120)
        before = len(steps_of(run_dir))
        output = driver.communicate(timeout=400)[0]
    finally:
        slurm.start_node(job["host"])

    assert driver.returncode == 0, output
    assert before < 1200, "the run had ended before its node was given up"
    assert json.loads((run_dir / "result.json").read_text())["status"] == "completed"
    assert steps_of(run_dir) == list(range(1, 1201))


def test_ctrl_c_leaves_the_jobs_to_themselves_and_the_same_command_finds_them(slurm: SlurmCluster, tmp_path):
    words = (*SLURM, *LONG, "name=left")
    driver = start(slurm, tmp_path, *words)
    run_dir = tmp_path / "runs/left"
    wait_for_steps(run_dir, 1)

    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=60)[0]

    assert driver.returncode == 130
    assert "detached: the jobs go on." in output
    for hint in ("llmkit jobs watch runs/left", "llmkit jobs logs runs/left -f", "llmkit jobs cancel runs/left"):
        assert hint in output
    job_id = job_of(run_dir)["job_id"]
    assert slurm.states()[job_id] == "RUNNING"

    again = start(slurm, tmp_path, *words)
    wait_until(lambda: len(slurm.states()) >= 1, "", 1)
    assert again.stdout is not None
    assert f"job     {job_id} runs runs/left already (running)" in again.stdout.readline()
    slurm.ask("scancel", job_id)
    rest = again.communicate(timeout=60)[0]
    assert again.returncode == 75, rest
    assert job_of(run_dir)["starts"] == 1  # what is cancelled is not queued again


def test_a_sweep_that_nobody_waits_for_is_not_queued_twice(slurm: SlurmCluster, run_llmkit, tmp_path):
    words = ("train", *SLURM, "launcher.wait=false", *LONG, "-m", "lora.r=2,4", "name=later")

    first = run_llmkit(*words, env=slurm.environment)
    second = run_llmkit(*words, env=slurm.environment)

    jobs = slurm.states()
    slurm.ask("scancel", *jobs)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "llmkit jobs collect runs/later" in first.stdout
    assert second.stdout.count("is at it already") == 2
    assert len(jobs) == 2
    wait_until(lambda: not slurm.states(), slurm.told, 60)


def test_a_wrong_partition_is_refused_with_those_there_are(slurm: SlurmCluster, run_llmkit, tmp_path):
    done = run_llmkit("train", *SLURM, "launcher.partition=mian", env=slurm.environment)

    assert done.returncode == 2
    assert "launcher.partition=mian: this cluster has main, other. Did you mean 'main'?" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("sweep", [(), ("-m", "lora.r=2,4")], ids=["run", "sweep"])
def test_what_slurm_refuses_leaves_nothing_queued_and_no_run(slurm: SlurmCluster, run_llmkit, tmp_path, sweep):
    done = run_llmkit("train", *SLURM, "launcher.mem_gb=500", "name=large", *sweep, env=slurm.environment)

    assert done.returncode == 2
    assert "Slurm refuses the job: Memory specification can not be satisfied" in done.stderr
    assert list((tmp_path / "runs").glob("**/config.yaml")) == []
    assert not slurm.states()


def test_gpus_that_no_node_has_are_refused(slurm: SlurmCluster, run_llmkit):
    done = run_llmkit("train", *SLURM, "launcher.gpus_per_node=1", env=slurm.environment)

    assert done.returncode == 2
    assert "launcher.gpus_per_node=1: there are no GPUs" in done.stderr


def test_what_would_fail_on_the_node_is_found_before_anything_is_queued(slurm: SlurmCluster, run_llmkit, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    words = ("train", *SLURM, "launcher.preflight=true", f"data.path={bad}", "model=tiny", "-m", "lora.r=2,4")

    done = run_llmkit(*words, env=slurm.environment)

    assert done.returncode == 2
    assert done.stderr.count(f"{bad}, line 1: not JSON") == 1  # the data is looked at once
    assert "Nothing was queued" in done.stderr
    assert not slurm.states()
    assert not list((tmp_path / "runs").glob("*"))


def test_a_model_that_cannot_be_had_is_found_before_anything_is_queued(slurm: SlurmCluster, run_llmkit):
    done = run_llmkit("train", *SLURM, "launcher.preflight=true", "model=org/none", env=slurm.environment)

    assert done.returncode == 2
    assert "org/none is not in the local cache and the hub cannot be reached" in done.stderr


def test_an_adapter_that_cannot_be_served_as_asked_is_found_before_anything_is_queued(slurm: SlurmCluster, run_llmkit):
    words = ("launcher.preflight=true", "lora.use_dora=true", "serve.adapter=unmerged")

    done = run_llmkit("train", *SLURM, *words, env=slurm.environment)

    assert done.returncode == 2
    assert "serve.adapter=unmerged: vLLM does not serve DoRA beside a base" in done.stderr


def test_slurm_is_asked_for_what_the_config_says(slurm: SlurmCluster, run_llmkit, tmp_path):
    words = ("launcher.time=1-02:00:00", "launcher.mem_gb=1.5", "launcher.partition=other", "launcher.wait=false")
    more = ("launcher.setup=[export SEEN=yes]", "launcher.additional_parameters.comment=ours", "training.max_steps=1")

    done = run_llmkit("train", *SLURM, *words, *more, "evaluation=off", "name=asked", env=slurm.environment)

    assert done.returncode == 0, done.stderr
    job = slurm.ask("scontrol", "--oneliner", "show", "job", job_of(tmp_path / "runs/asked")["job_id"])
    for fact in ("TimeLimit=1-02:00:00", "MinMemoryNode=1.50G", "Partition=other", "Comment=ours", "Requeue=1"):
        assert fact in job.replace("1536M", "1.50G")
    script = next((tmp_path / "runs/asked/slurm").glob("*_submission.sh")).read_text()
    assert script.index("export SEEN=yes") < script.index("srun ")
    wait_until(lambda: not slurm.states(), slurm.told, 120)


def test_each_process_has_a_core_where_nothing_else_is_asked_for(slurm: SlurmCluster, run_llmkit, tmp_path):
    later = "launcher.additional_parameters.begin=now+1hour"
    words = ("launcher=slurm", "launcher.preflight=false", "launcher.wait=false", later, "hardware.num_processes=2")

    done = run_llmkit("train", *words, CPU, "name=cores", env=slurm.environment)
    assert done.returncode == 0, done.stderr
    job_id = job_of(tmp_path / "runs/cores")["job_id"]
    job = slurm.ask("scontrol", "--oneliner", "show", "job", job_id)
    slurm.ask("scancel", job_id)

    assert "CPUs/Task=2" in job
    script = next((tmp_path / "runs/cores/slurm").glob("*_submission.sh")).read_text()
    assert "--cpus-per-task=2" in script[script.index("srun ") :]  # srun does not take sbatch's


@pytest.mark.parametrize("option", ["cpus-per-task=4", "cpus_per_gpu=4", "exclusive=true"])
def test_cores_that_are_asked_for_by_an_option_of_sbatch_are_left_to_it(compose, option):
    from llmkit.launchers.slurm import Slurm

    config = compose("launcher=slurm", CPU, "hardware.num_processes=2", f"launcher.additional_parameters.{option}")
    parameters = Slurm().parameters(config)

    assert "cpus_per_task" not in parameters
    assert parameters["srun_args"] == ["--mpi=none"]


def test_the_nodes_of_a_job_agree_on_where_they_meet(slurm: SlurmCluster, tmp_path):
    from llmkit.launchers.slurm_job import BEFORE

    program = "from llmkit.launchers.slurm_job import place; print(place())"
    script = tmp_path / "script.sh"
    script.write_text("\n".join(["#!/bin/bash", *BEFORE, f"srun {shlex.join([sys.executable, '-c', program])}", ""]))
    command = ["sbatch", "--wait", "--nodes=2", "--ntasks-per-node=1", "--output=places", str(script)]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)} | slurm.environment

    subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=120, check=True)

    places = sorted((tmp_path / "places").read_text().splitlines())
    assert [re.search(r"rank=(\d), nodes=2", one)[1] for one in places] == ["0", "1"]
    (meeting,) = {re.search(r"rendezvous='(127\.0\.0\.1|node1):(\d+)'", one)[0] for one in places}
    assert 20000 <= int(re.search(r":(\d+)'", meeting)[1]) < 30000


def test_without_slurm_the_message_says_where_to_start(run_llmkit, tmp_path):
    done = run_llmkit("train", "launcher=slurm", env={"PATH": str(tmp_path)})

    assert done.returncode == 2
    assert "launcher=slurm: there is no sbatch here" in done.stderr


def test_a_slurm_that_does_not_answer_is_explained_before_anything_is_left(run_llmkit, tmp_path):
    done = run_llmkit("train", "launcher=slurm", "name=a", env={"SLURM_CONF": str(tmp_path / "none.conf")})

    assert done.returncode == 2
    assert "launcher=slurm: no Slurm answers here. sinfo failed: " in done.stderr
    assert "export SLURM_CONF" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ((CPU,), None),
        ((CPU, "launcher.python=env/bin/python"), "env/bin/python"),
        ((CPU, IMAGE, "launcher.container_args=[--bind, /data]"), "apptainer exec --bind /data image.sif python"),
        ((CUDA, IMAGE), "apptainer exec --nv image.sif python"),
        ((IMAGE, "hardware.num_processes=2", "launcher.gpus_per_node=2"), "apptainer exec --nv image.sif python"),
        ((CUDA, IMAGE, "launcher.container_args=[--nvccli]"), "apptainer exec --nvccli image.sif python"),
        ((CUDA, "launcher.container=image.sqsh", "launcher.container_runtime=pyxis"), "python"),
    ],
)
def test_python_on_the_nodes_is_this_one_or_that_of_a_container_which_sees_the_gpus(compose, words, command):
    from llmkit.launchers.slurm import Slurm

    assert Slurm().python_command(compose("launcher=slurm", *words)) == command


@pytest.mark.parametrize("time", ["90", "1:30:00", "2-12", "2-12:00:00"])
def test_times_are_those_of_sbatch(compose, time):
    assert str(compose("launcher=slurm", f"launcher.time={time}").launcher.time) == time


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("launcher.time=2h", "launcher.time=2h: minutes"),
        ("launcher.additional_parameters={--mail-type: END}", "without dashes, mail-type"),
        ("launcher.gpus_per_node=4", "launcher.gpus_per_node=4: a process takes one GPU"),
        ("launcher.container_runtime=docker", "must be one of apptainer"),
        ("launcher.max_parallel=2", "launcher.max_parallel: the chosen launcher has no such setting"),
    ],
)
def test_what_slurm_would_not_understand_is_refused(run_llmkit, word, message):
    done = run_llmkit("train", "launcher=slurm", word)

    assert done.returncode == 2
    assert message in done.stderr


def test_hydras_word_for_a_launcher_is_another_for_ours(compose):
    assert compose("hydra/launcher=slurm", "launcher.qos=high").launcher.qos == "high"
