"""Workers forked from one warm process: they do what workers with an interpreter of their own do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.config.launcher_schema import LocalLauncherConfig
from llmkit.errors import EXIT_PREEMPTED
from llmkit.launchers.local import worker_environment
from llmkit.launchers.warm import Forked, WarmStarts

CHECKOUT = Path(__file__).parents[2]
LONG = ("training.max_steps=100000", "evaluation=off", "training.logging_steps=1", "training.eval_steps=1000000")
SHORT = ("training.max_steps=3", "training.logging_steps=1", "evaluation=off")


@pytest.fixture(scope="module")
def configs() -> list[TrainConfig]:
    return [TrainConfig(seed=seed, launcher=LocalLauncherConfig()) for seed in (1, 2)]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    path = os.pathsep.join([str(CHECKOUT), str(Path(__file__).parent)])
    return worker_environment() | {"OMP_NUM_THREADS": "2", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def warm(configs, environment) -> Iterator[WarmStarts]:
    with WarmStarts(configs, environment, on_gpus=False) as starts:
        wait_until(lambda: starts.is_ready(configs[0]), "a warm process")
        yield starts


@pytest.fixture
def fork(warm, configs, environment, tmp_path) -> Callable[..., Forked]:
    """A function: the words of warm_subject -> the process; what it says is in `said`."""

    def start(*words: str, env: dict[str, str] | None = None, **inherited: int) -> Forked:
        with (tmp_path / "said").open("w") as output:
            forked = warm.start(
                configs[0],
                "warm_subject",
                *words,
                environment=environment | (env or {}),
                inherited=inherited,
                output=output,
            )
        assert forked is not None
        return forked

    return start


def wait_until(done: Callable[[], object], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what} was waited for in vain"
        time.sleep(0.05)


def said(tmp_path: Path) -> str:
    return (tmp_path / "said").read_text()


def test_a_forked_process_is_its_drivers_child_with_all_imported_and_nothing_touched(fork, tmp_path):
    forked = fork("tell")

    assert forked.wait() == 0, said(tmp_path)
    told = json.loads(said(tmp_path))
    assert told["imported"] == ["torch", "transformers", "trl", "peft", "datasets"]
    assert (told["parent"], told["pid"], told["group"]) == (os.getpid(), forked.pid, forked.pid)
    assert told["dies_with_parent_by"] == signal.SIGTERM
    assert told["main_thread"]
    assert told["threads"] == 1
    assert told["torch_threads"] == 2
    assert (told["cuda"], told["bad_fork"]) == (False, False)
    assert told["open"][:3] == ["/dev/null", str(tmp_path / "said"), str(tmp_path / "said")]
    assert [name for name in told["open"][3:] if not name.startswith("/proc/")] == []  # the directory that is listed
    assert told["signals"]["SIGTERM"] == told["signals"]["SIGCHLD"] == str(signal.SIG_DFL)
    assert told["argv"] == [str(Path(__file__).with_name("warm_subject.py")), "tell"]


def test_every_process_has_the_environment_it_was_ordered_with_and_luck_of_its_own(fork, environment, tmp_path):
    told = []
    for number in ("3", "5"):
        assert fork("tell", env={"CUDA_VISIBLE_DEVICES": number, "MY_TOKEN": f"secret {number}"}).wait() == 0
        told.append(json.loads(said(tmp_path)))

    for number, one in zip(("3", "5"), told, strict=True):
        assert one["environment"] == environment | {
            "CUDA_VISIBLE_DEVICES": number,
            "MY_TOKEN": f"secret {number}",
        }
    assert told[0]["random"] != told[1]["random"]


def test_all_that_is_said_goes_to_the_jobs_own_file(fork, tmp_path, capfd):
    assert fork("talk").wait() == 0

    lines = ["Python", "a C library", "a subprocess", "its stderr", "stderr", "an exit handler"]
    assert said(tmp_path).splitlines() == lines
    assert capfd.readouterr() == ("", "")


def test_threads_of_torch_and_autograd_work_in_every_fork(fork, tmp_path):
    for _ in range(4):
        assert fork("train").wait() == 0
        assert said(tmp_path).split() == ["2", str(500.0**3 * 2)]


@pytest.mark.parametrize(
    ("how", "code"), [("0", 0), ("75", 75), ("SIGTERM", -signal.SIGTERM), ("SIGKILL", -signal.SIGKILL)]
)
def test_the_exit_code_or_the_signal_that_ended_it_is_seen(fork, how, code):
    forked = fork("end", how)

    assert forked.wait() == code
    assert forked.poll() == forked.returncode == code
    forked.send_signal(signal.SIGTERM)  # to nobody


def test_the_lock_is_the_forked_processs_alone_and_ends_with_it(fork, tmp_path):
    lock = rundir.lock(tmp_path)
    forked = fork("hold", str(tmp_path), LLMKIT_LOCK_FD=lock.fileno())
    lock.close()
    wait_until((tmp_path / "held").exists, "the process")

    assert forked.poll() is None
    assert rundir.is_locked(tmp_path)
    forked.send_signal(signal.SIGKILL)
    forked.wait()
    assert not rundir.is_locked(tmp_path)


def test_jobs_of_several_processes_and_those_that_cannot_share_imports_start_afresh(compose, environment, tmp_path):
    several = compose("-m", "lora.r=4,8", "hardware=cpu", "hardware.num_processes=2")
    off = compose("-m", "lora.r=4,8", "hardware=cpu", "launcher.warm=false")
    alone = compose("-m", "hardware.env.SOME=1,2", "hardware=cpu")
    on_gpus = compose("-m", "lora.r=4,8", "method=qlora", "training.optim=adamw_bnb_8bit")
    there = psutil.Process().children()
    for configs in (several, off, alone, on_gpus):
        gpus = configs is on_gpus
        with WarmStarts(configs, environment, on_gpus=gpus) as starts, (tmp_path / "said").open("w") as log:
            assert starts.is_ready(configs[0])
            assert starts.start(configs[0], "warm_subject", environment={}, inherited={}, output=log) is None
            assert psutil.Process().children() == there


def test_a_run_of_a_warm_worker_is_that_of_a_fresh_one_to_the_last_bit(run_llmkit, tmp_path):
    words = ("-m", "lora.r=4,8", "lora.lora_dropout=0.1", "training.max_steps=8", "training.logging_steps=1")
    for name in ("warm", "fresh"):
        start = f"launcher.warm={str(name == 'warm').lower()}"
        done = run_llmkit("train", *words, f"name={name}", start, env={"PYTHONHASHSEED": "0"})  # PEFT writes sets
        assert done.returncode == 0, done.stderr

    for job in ("r=4", "r=8"):
        warm, fresh = tmp_path / "runs/warm" / job, tmp_path / "runs/fresh" / job
        assert files_of(warm) == files_of(fresh)
        for name in ("adapter_model.safetensors", "tokenizer.json", "adapter_config.json"):
            assert (warm / "final" / name).read_bytes() == (fresh / "final" / name).read_bytes()
        assert figures_of(warm) == figures_of(fresh)
        assert result_of(warm) == result_of(fresh)
        assert config_of(warm) == config_of(fresh).replace("runs/fresh", "runs/warm").replace(
            "warm: false", "warm: true"
        )
        assert facts_of(warm) == facts_of(fresh)


def files_of(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))


def figures_of(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


def result_of(run_dir: Path) -> dict:
    return without_clock(json.loads((run_dir / "result.json").read_text()))


def without_clock(record: dict) -> dict:
    """What does not depend on how fast and how full the machine is."""
    return {key: value for key, value in record.items() if not ("second" in key or "memory" in key or key == "time")}


def config_of(run_dir: Path) -> str:
    return (run_dir / "config.yaml").read_text()


def facts_of(run_dir: Path) -> list[str]:
    """What the log tells of, without the figures of this time."""
    lines = [line.split() for line in (run_dir / "console.log").read_text().splitlines()]
    return [words[0] for words in lines if words and words[0] != str(run_dir.relative_to(run_dir.parents[2]))]


def start(cwd: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "llmkit.train", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def worker_of(run_dir: Path) -> psutil.Process:
    return psutil.Process(json.loads((run_dir / "job.json").read_text())["process"])


def warm_process(driver: subprocess.Popen, run_dir: Path) -> psutil.Process:
    """The one beside the worker of this run, which is a child of the driver too."""
    (process,) = (p for p in psutil.Process(driver.pid).children() if p != worker_of(run_dir))
    assert "llmkit.warm_worker" in process.cmdline()
    return process


def test_a_killed_driver_takes_its_warm_process_along_and_its_worker_saves(tmp_path):
    driver = start(tmp_path, "name=long", "-m", "lora.r=4,8", *LONG)
    run_dir = tmp_path / "runs/long/r=4"
    wait_until(lambda: steps(run_dir) > 1, "a step")
    left = [worker_of(run_dir), warm_process(driver, run_dir)]

    driver.kill()
    driver.communicate(timeout=60)

    assert psutil.wait_procs(left, timeout=60)[1] == []
    assert json.loads((run_dir / "result.json").read_text())["status"] == "preempted"
    assert not (tmp_path / "runs/long/r=8").exists()


def test_a_warm_process_that_is_killed_ends_no_run_and_those_to_come_start_afresh(tmp_path):
    driver = start(tmp_path, "name=s", "-m", "lora.r=4,8,16", "training.max_steps=60", *SHORT[1:])
    wait_until(lambda: steps(tmp_path / "runs/s/r=4") > 0, "a step")
    warm_process(driver, tmp_path / "runs/s/r=4").kill()

    output = driver.communicate(timeout=300)[0]

    assert driver.returncode == 0, output
    assert output.count("the process that workers are forked from has ended by SIGKILL; jobs start afresh") == 1
    jobs = json.loads((tmp_path / "runs/s/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["completed"] * 3


def test_a_worker_that_is_killed_is_told_of_and_the_next_is_forked(tmp_path):
    driver = start(tmp_path, "name=s", "-m", "lora.r=4,8", "training.max_steps=200", *SHORT[1:])
    killed = tmp_path / "runs/s/r=4"
    wait_until(lambda: steps(killed) > 0, "a step")
    worker_of(killed).kill()

    output = driver.communicate(timeout=300)[0]

    assert driver.returncode == 1, output
    assert "error: the worker of runs/s/r=4 was ended by SIGKILL (the system is out of memory?)." in output
    jobs = json.loads((tmp_path / "runs/s/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["failed", "completed"]


def test_a_sweep_that_is_stopped_while_libraries_are_imported_stops_at_once(tmp_path):
    driver = start(tmp_path, "name=s", "-m", "lora.r=4,8", *LONG)
    wait_until((tmp_path / "runs/s/sweep.json").exists, "the sweep")
    wait_until(lambda: psutil.Process(driver.pid).children(), "a warm process")
    (warm,) = psutil.Process(driver.pid).children()

    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=60)[0]

    assert driver.returncode == EXIT_PREEMPTED, output
    assert not warm.is_running()
    jobs = json.loads((tmp_path / "runs/s/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["waiting", "waiting"]


def test_a_sweep_imports_the_libraries_once_and_its_jobs_have_processes_of_their_own(run_llmkit, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'LLMKIT_DRIVER' in os.environ:\n"
        "    open(os.environ['SEEN'], 'a').write(sys.orig_argv[2] + '\\n')\n"
    )
    env = {"SEEN": str(tmp_path / "seen"), "PYTHONPATH": f"{tmp_path}:{CHECKOUT}"}

    done = run_llmkit("train", "-m", "lora.r=2,4,8", "name=s", *SHORT, env=env)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text().split() == ["llmkit.warm_worker"]
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs/s").glob("*/job.json")]
    assert len({record["process"] for record in records}) == 3


def test_where_a_library_starts_a_thread_jobs_start_afresh_and_it_is_said(run_llmkit, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "if 'llmkit.warm_worker' in sys.orig_argv:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )

    done = run_llmkit("train", "-m", "lora.r=2,4", "name=s", *SHORT, env={"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"})

    assert done.returncode == 0, done.stderr
    assert "warning: a library has started threads (" in done.stderr
    assert "jobs start afresh and import their libraries each." in done.stderr
