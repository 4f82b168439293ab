"""`launcher=packed`: runs that share a process and a base learn, to the last bit, what each learns alone."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_records import sweep_of, wait_for_steps
from safetensors.torch import load_file

from llmkit import rundir
from llmkit.config import save
from llmkit.launchers.packed import packs, why_not
from llmkit.launchers.sweep import Job
from llmkit.training.metrics import read_metrics

STEPS = ["training.max_steps=30", "training.logging_steps=1", "training.save_steps=15", "evaluation.samples=1"]
# Of equal length at each step, since the rows come in the same order: the same shapes for each run, together or not.
SWEEPS = {
    "ranks, rates and clipping": [
        *("lora.r=4,8,16,32", "training.learning_rate=2e-3,1e-2", "training.max_grad_norm=0.5", "evaluation=off"),
    ],
    "dropout, accumulation, checkpointing and bf16": [
        *("precision=bf16", "lora.r=8,32", "lora.lora_dropout=0.1", "lora.target_modules=[q_proj,down_proj]"),
        *("training.gradient_accumulation_steps=2", "training.gradient_checkpointing=true"),
    ],
    "qlora": ["method=qlora", "lora.r=4,8", "evaluation=off"],
    "qlora with dropout": ["method=qlora", "lora.r=4,8", "lora.lora_dropout=0.1", "evaluation=off"],
    "dpo and bf16": ["recipe=dpo", "precision=bf16", "lora.r=4,8", "evaluation=off"],
}


def figures(run_dir):
    """What a run has measured, without the clock."""
    return [{k: v for k, v in r.items() if "second" not in k} for r in read_metrics(run_dir)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_packed_runs_equal_runs_of_their_own(run_llmkit, tmp_path, name):
    words = ["-m", *SWEEPS[name], *STEPS]
    apart = run_llmkit("train", "name=apart", *words)
    packed = run_llmkit("train", "name=packed", "launcher=packed", "launcher.width=8", *words)

    assert (apart.returncode, packed.returncode) == (0, 0), packed.stdout + packed.stderr
    jobs = sweep_of(tmp_path / "runs/packed")
    assert f"{len(jobs)} runs on one base, {len(jobs)} at a time" in packed.stdout
    assert (
        f"{30 * len(jobs) * (2 if 'accumulation' in name else 1)} micro-batches, all of them together" in packed.stdout
    )
    for job in jobs:
        one = tmp_path / job["run_dir"]
        twin = tmp_path / "runs/apart" / one.name
        assert figures(one) == figures(twin)
        mine, its = (load_file(run / rundir.FINAL / "adapter_model.safetensors") for run in (one, twin))
        assert all(mine[key].equal(its[key]) for key in its)
        assert {path.name for path in one.iterdir()} == {path.name for path in twin.iterdir()}
        assert rundir.read_result(one).keys() == rundir.read_result(twin).keys()


def distance(run, other):
    """How far the weights of one run lie from those of another, in parts of their length."""
    mine, its = (load_file(place / rundir.FINAL / "adapter_model.safetensors") for place in (run, other))
    apart, length = (sum(float(w.square().sum()) for w in ws) for ws in ([mine[k] - its[k] for k in its], its.values()))
    return (apart / length) ** 0.5


@pytest.mark.slow
def test_packed_runs_whose_batches_differ_are_as_near_to_their_own_as_with_one_more_padded_column(
    run_llmkit, compose, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["training.max_steps=30", "training.global_batch_size=4", "evaluation=off"]
    sweep = ["-m", "seed=1,2", "training.learning_rate=1e-3"]
    apart = run_llmkit("train", "name=apart", *words, *sweep)
    packed = run_llmkit(
        "train", "name=packed", "launcher=packed", "launcher.width=2", "launcher.verify=2", *words, *sweep
    )
    assert (apart.returncode, packed.returncode) == (0, 0), packed.stdout + packed.stderr
    assert packed.stdout.count("the first 2 steps: gradients ") == 2, packed.stdout

    moved = dict.fromkeys(("packed", "padded"), 0.0)
    for seed in (1, 2):
        run_dir = tmp_path / "runs/padded" / f"seed={seed}"
        run_dir.mkdir(parents=True)
        save(compose(*words, f"seed={seed}", "training.learning_rate=1e-3", f"run_dir={run_dir}"), run_dir)
        subprocess.run([sys.executable, Path(__file__).with_name("padded_worker.py"), run_dir], check=True)
        own = tmp_path / "runs/apart" / run_dir.name
        for name in moved:
            moved[name] = max(moved[name], distance(tmp_path / "runs" / name / run_dir.name, own))
    assert 0 < moved["padded"] < 1e-3
    assert moved["packed"] <= 2 * moved["padded"]  # both are draws of the same rounding


@pytest.mark.slow
def test_a_pack_goes_on_from_where_each_of_its_runs_was_as_if_it_had_not_been_stopped(run_llmkit, tmp_path, chats_file):
    rows = chats_file(*({"question": f"{n}+{n}?", "answer": f"{2 * n}"} for n in range(10, 50)))  # of equal lengths
    words = [f"data.path={rows}", "data.validation=null", "training.global_batch_size=4", "training.logging_steps=1"]
    words += ["-m", "training.max_steps=5,60,70", "training.learning_rate=1e-3", "lora.lora_dropout=0.1"]
    whole = run_llmkit("train", "name=whole", *words)
    pack = [sys.executable, "-m", "llmkit", "train", "name=pack", "launcher=packed", "launcher.width=2", *words]
    driver = subprocess.Popen(pack, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    runs = [tmp_path / "runs/pack" / f"max_steps={steps}" for steps in (5, 60, 70)]
    wait_for_steps(runs[2], 10)  # by now the first is finished, and the third trains in its place

    driver.terminate()
    said = driver.communicate(timeout=60)[0]
    before = [rundir.read_result(run) for run in runs]
    again = run_llmkit("train", "name=pack", "launcher=packed", "launcher.width=2", *words)

    assert (whole.returncode, driver.returncode, again.returncode) == (0, 75, 0), said + again.stdout + again.stderr
    assert [result["status"] for result in before] == ["completed", "preempted", "preempted"]
    assert "2 jobs to run; 1 finished before and are kept" in again.stdout
    for run in runs:
        twin = tmp_path / "runs/whole" / run.name
        assert figures(run) == figures(twin)
        assert distance(run, twin) == 0


@pytest.mark.slow
def test_runs_of_a_pack_are_cancelled_without_the_others(run_llmkit, tmp_path):
    words = ["name=pack", "launcher=packed", "launcher.width=2", "evaluation=off", "training.logging_steps=1"]
    words += ["training.global_batch_size=2", "-m", "training.max_steps=500,5000,5001"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "train", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    runs = [tmp_path / "runs/pack" / f"max_steps={steps}" for steps in (500, 5000, 5001)]
    wait_for_steps(runs[1], 1)

    told = [run_llmkit("jobs", "cancel", f"pack/{run.name}") for run in (runs[2], runs[1])]
    said = driver.communicate(timeout=120)[0]

    assert [one.returncode for one in told] == [0, 0], told[0].stderr + told[1].stderr
    going_on = [one.stdout.partition("going on: ")[2].strip() for one in told]
    assert going_on == ["max_steps=500, max_steps=5000", "max_steps=500"]
    assert driver.returncode == 75, said
    results = [rundir.read_result(run) for run in runs]
    assert [result["status"] for result in results] == ["completed", "preempted", "stopped"]
    assert results[1]["steps"] < 5000
    assert "by llmkit jobs cancel at step" in (runs[1] / "console.log").read_text()
    assert "stopped by llmkit jobs cancel before it began" in results[2]["error"]
    assert not [run for run in runs if (run / ".cancel").exists()]


@pytest.mark.slow
def test_a_run_that_is_cancelled_at_a_rung_leaves_it_to_the_others(run_llmkit, tmp_path):
    words = ["name=half", "launcher=packed", "launcher.width=1", "evaluation=off", "training.logging_steps=1"]
    words += ["early_stop=halving", "early_stop.min_steps=20", "early_stop.reduction_factor=2", "training.max_steps=40"]
    words += ["-m", "training.learning_rate=1e-2,1e-4,3e-3"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "train", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    runs = [tmp_path / "runs/half" / f"learning_rate={rate}" for rate in ("0.01", "0.0001", "0.003")]
    wait_for_steps(runs[1], 1)  # by now the first waits at its rung

    (runs[0] / ".cancel").touch()
    said = driver.communicate(timeout=120)[0]

    assert driver.returncode == 75, said
    results = [rundir.read_result(run) for run in runs]
    assert [(one["status"], one["steps"]) for one in results] == [("preempted", 20), ("stopped", 20), ("completed", 40)]
    assert (results[1]["early_stop"]["place"], results[1]["early_stop"]["of"]) == (2, 2)
    assert rundir.read_json(runs[0] / "rungs.json") == {}


@pytest.mark.slow
def test_runs_of_a_pack_that_have_not_begun_when_it_is_stopped_wait_for_the_next_time(run_llmkit, tmp_path):
    words = ["name=pack", "launcher=packed", "launcher.width=1", "evaluation=off", "-m", "training.max_steps=500,501"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "train", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    runs = [tmp_path / "runs/pack" / f"max_steps={steps}" for steps in (500, 501)]
    wait_for_steps(runs[0], 1)
    driver.terminate()
    said = driver.communicate(timeout=60)[0]

    assert driver.returncode == 75, said
    assert [job["status"] for job in sweep_of(tmp_path / "runs/pack")] == ["preempted", "stopped"]
    assert not (runs[1] / rundir.METRICS).exists()


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_of_its_pack_alone(run_llmkit, tmp_path):
    words = ["-m", "training.learning_rate=1e-3,1e30", "training.warmup_steps=0", "evaluation=off", *STEPS]
    done = run_llmkit("train", "name=two", "launcher=packed", "launcher.width=2", *words)

    assert done.returncode == 1
    good, bad = sweep_of(tmp_path / "runs/two")
    assert (good["status"], bad["status"]) == ("completed", "failed")
    assert "is not a finite number" in bad["error"]


@pytest.fixture
def job(compose, tmp_path):
    """A function that makes a job of these words."""

    def make(name, *words):
        return Job(overrides=[], run_dir=tmp_path / name, config=compose(*words))

    return make


def test_runs_are_packed_that_differ_in_nothing_but_what_is_their_own(job, capsys):
    jobs = [
        job("a", "method=lora", "lora.r=4"),
        job("b", "method=lora", "lora.r=8", "seed=7", "training.learning_rate=1e-3", "training.max_steps=5"),
        job("c", "method=lora", "training.global_batch_size=4"),
        job("d", "method=full"),
        job("e", "method=lora", "lora.target_modules=[q_proj]"),
    ]

    found = [[one.run_dir.name for one in pack] for pack in packs(jobs)]

    assert found == [["a", "b", "e"], ["c"], ["d"]]
    said = capsys.readouterr().err
    assert "alone   d: method=full trains the base itself" in said
    assert "alone   c: differs from the others in training.global_batch_size" in said


def test_runs_whose_seed_draws_a_part_of_the_base_do_not_share_one(job):
    sampled = ["method=lora", "data.special_tokens=[<a>]", "data.special_tokens_init=sample"]
    jobs = [job("a", *sampled, "lora.r=4", "seed=1"), job("b", *sampled, "lora.r=8", "seed=1")]

    found = packs([*jobs, job("c", *sampled, "seed=2")])

    assert [[one.run_dir.name for one in pack] for pack in found] == [["a", "b"], ["c"]]


def test_each_device_gets_a_pack_where_there_are_jobs_enough(job):
    jobs = [job(str(rank), "method=lora", f"lora.r={rank}") for rank in (2, 4, 8, 16, 32)]

    assert [len(pack) for pack in packs(jobs, devices=2)] == [3, 2]
    assert [len(pack) for pack in packs(jobs, devices=8)] == [1] * 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["method=full"], "method=full trains the base itself"),
        (["method=lora", "lora.bias=all"], "trains biases of the base"),
        (["method=qlora", "qlora.bits=8"], "rounds a batch by its largest activations"),
        (["method=lora", "lora.init_lora_weights=pissa"], "changes the base"),
        (["method=lora", "hardware.num_processes=2", "hardware=cpu"], "several processes"),
    ],
)
def test_a_run_that_would_touch_the_base_stays_alone(job, words, reason):
    assert reason in why_not(job("one", *words).config)


HALVING = ["-m", "training.learning_rate=3e-3,1e-4,1e-2,3e-4", "early_stop=halving", "early_stop.reduction_factor=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "is_stopped"),
    [
        (["launcher=packed", "launcher.width=4", "export.merge=true"], False),
        (["launcher=packed"], True),
        (["launcher=local"], False),
    ],
    ids=["packed", "packed one after the other, stopped, gone on with", "local"],
)
def test_runs_that_are_behind_at_a_rung_stop_there_and_the_winner_is_as_if_alone(
    run_llmkit, tmp_path, launcher, is_stopped
):
    few = ["training.max_steps=20", "early_stop.min_steps=5", "training.logging_steps=1", "evaluation=off"]
    few += ["lora.lora_dropout=0.1"]
    words = ["train", "name=half", *launcher, *few, *HALVING]
    if is_stopped:  # when the first waits at a rung for the others, of which one has begun
        driver = subprocess.Popen(
            [sys.executable, "-m", "llmkit", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        wait_for_steps(tmp_path / "runs/half/learning_rate=0.0001", 1)
        driver.terminate()
        said = driver.communicate(timeout=60)[0]
        assert driver.returncode == 75, said
        assert not any(rundir.is_over(rundir.read_result(run)) for run in (tmp_path / "runs/half").glob("l*"))
    done = run_llmkit(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {
        job["run_dir"]: rundir.read_result(tmp_path / job["run_dir"]) for job in sweep_of(tmp_path / "runs/half")
    }

    stopped = [result for result in results.values() if result["status"] == "stopped"]
    assert stopped
    for result in stopped:
        assert result["early_stop"]["step"] == result["steps"]
        assert f"place {result['early_stop']['place']} of " in result["error"]
    if launcher[0] == "launcher=packed":  # all are compared: 4, 2, 1
        assert sorted(result["steps"] for result in results.values()) == [5, 5, 10, 20]

    winner = min(
        (place for place in results if results[place]["status"] == "completed"),
        key=lambda place: results[place]["eval_loss"],
    )
    if "export.merge=true" in launcher:
        assert [path.parent.name for path in (tmp_path / "runs/half").glob("*/merged")] == [Path(winner).name]
    rate = winner.partition("learning_rate=")[2]
    alone = run_llmkit("train", "name=alone", f"training.learning_rate={rate}", *[w for w in few if "early" not in w])
    assert alone.returncode == 0, alone.stderr
    files = [run / rundir.FINAL / "adapter_model.safetensors" for run in (tmp_path / winner, tmp_path / "runs/alone")]
    mine, its = map(load_file, files)
    assert all(mine[key].equal(its[key]) for key in its)

    again = run_llmkit(*words)
    kept = f"{len(results)} finished before and are kept ({len(stopped)} stopped by early_stop"
    assert f"0 jobs to run; {kept}" in again.stdout
    assert sum("early_stop=halving: place" in (job["error"] or "") for job in sweep_of(tmp_path / "runs/half")) == len(
        stopped
    )
    page = (tmp_path / "runs/half/report.html").read_text()
    assert f"out of {len(results)} runs" in page


@pytest.mark.slow
def test_runs_are_compared_by_a_figure_that_the_sweep_is_ranked_by(run_llmkit, tmp_path):
    words = ["objective=exact_match", "evaluation.examples=4", "training.max_steps=4", "early_stop.min_steps=2"]
    done = run_llmkit("train", "name=half", "launcher=packed", *words, *HALVING[:1], "lora.r=2,4", *HALVING[2:])

    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [tmp_path / job["run_dir"] for job in sweep_of(tmp_path / "runs/half")]
    assert sorted(rundir.read_result(job)["status"] for job in jobs) == ["completed", "stopped"]
    for job in jobs:
        found = rundir.read_json(job / "rungs.json")["2"]
        logged = [
            record["exact_match"] for record in read_metrics(job) if record["step"] == 2 and "exact_match" in record
        ]
        assert [found["exact_match"]] == logged
        assert math.isfinite(found["eval_loss"])


@pytest.mark.slow
def test_what_the_copies_of_a_sweep_lack_is_sent_by_the_same_command(run_llmkit, tmp_path):
    fast = ["training.max_steps=2", "evaluation=off", f"checkpoint.remote={tmp_path / 'copies'}"]
    words = ["train", "name=pack", "launcher=packed", *fast, "-m", "lora.r=2,4"]
    copy = tmp_path / "copies/pack/r=2"
    assert run_llmkit(*words).returncode == 0
    (copy / "result.json").unlink()

    again = run_llmkit(*words)

    assert again.returncode == 0, again.stderr
    assert "0 jobs to run" in again.stdout
    assert f"{copy} is complete" in again.stdout
    assert rundir.read_result(copy) == rundir.read_result(tmp_path / "runs/pack/r=2")

    shutil.rmtree(copy)
    copy.write_text("in the way")
    again = run_llmkit(*words)
    assert again.returncode == 1
    assert "error: r=2: " in again.stderr
