"""`launcher=packed`: runs that share a process and a base learn, to the last bit, what each learns alone."""

import pytest
from run_records import sweep_of
from safetensors.torch import load_file

from llmkit import rundir
from llmkit.launchers.packed import packs, why_not
from llmkit.launchers.sweep import Job
from llmkit.training.metrics import read_metrics

STEPS = ["training.max_steps=30", "training.logging_steps=1", "training.save_steps=15", "evaluation.samples=1"]
# Of equal length at each step, since the rows come in the same order: the same shapes for each run, together or not.
SWEEPS = {
    "rates and clipping": ["lora.r=4,16", "training.learning_rate=2e-3,1e-2", "training.max_grad_norm=0.5"],
    "dropout, accumulation and checkpointing": [
        *("lora.r=8,32", "lora.lora_dropout=0.1", "lora.target_modules=[q_proj,down_proj]"),
        *("training.gradient_accumulation_steps=2", "training.gradient_checkpointing=true"),
    ],
}


def figures(run_dir):
    """What a run has measured, without the clock."""
    return [{k: v for k, v in r.items() if "second" not in k} for r in read_metrics(run_dir)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_packed_runs_equal_runs_of_their_own(run_llmkit, tmp_path, name):
    words = ["-m", *SWEEPS[name], *STEPS]
    apart = run_llmkit("train", "name=apart", *words)
    packed = run_llmkit("train", "name=packed", "launcher=packed", "launcher.width=4", *words)

    assert (apart.returncode, packed.returncode) == (0, 0), packed.stdout + packed.stderr
    jobs = sweep_of(tmp_path / "runs/packed")
    said = (tmp_path / "runs/packed" / rundir.CONSOLE).read_text()
    assert f"{len(jobs)} runs on one base, {len(jobs)} at a time" in said
    assert f"{30 * len(jobs) * (2 if 'dropout' in name else 1)} micro-batches, all of them together" in said
    for job in jobs:
        one = tmp_path / job["run_dir"]
        twin = tmp_path / "runs/apart" / one.name
        assert figures(one) == figures(twin)
        mine, its = (load_file(run / rundir.FINAL / "adapter_model.safetensors") for run in (one, twin))
        assert all(mine[key].equal(its[key]) for key in its)
        assert {path.name for path in one.iterdir()} == {path.name for path in twin.iterdir()}
        assert rundir.read_result(one).keys() == rundir.read_result(twin).keys()


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
    assert "alone   d: method=full trains the base itself" in capsys.readouterr().err


def test_each_device_gets_a_pack_where_there_are_jobs_enough(job):
    jobs = [job(str(rank), "method=lora", f"lora.r={rank}") for rank in (2, 4, 8, 16, 32)]

    assert [len(pack) for pack in packs(jobs, devices=2)] == [3, 2]
    assert [len(pack) for pack in packs(jobs, devices=8)] == [1] * 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["method=full"], "method=full trains the base itself"),
        (["method=lora", "lora.bias=all"], "trains biases of the base"),
        (["method=lora", "lora.init_lora_weights=pissa"], "changes the base"),
        (["method=lora", "hardware.num_processes=2", "hardware=cpu"], "several processes"),
    ],
)
def test_a_run_that_would_touch_the_base_stays_alone(job, words, reason):
    assert reason in why_not(job("one", *words).config)


HALVING = ["-m", "training.learning_rate=3e-3,1e-4,1e-2,3e-4", "early_stop=halving", "early_stop.reduction_factor=2"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["launcher=packed", "launcher.width=4"], ["launcher=packed"], ["launcher=local"]])
def test_runs_that_are_behind_at_a_rung_stop_there_and_the_winner_is_as_if_alone(run_llmkit, tmp_path, launcher):
    few = ["training.max_steps=20", "early_stop.min_steps=5", "training.logging_steps=1", "evaluation=off"]
    done = run_llmkit("train", "name=half", *launcher, *few, *HALVING)
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
    rate = winner.partition("learning_rate=")[2]
    alone = run_llmkit("train", "name=alone", f"training.learning_rate={rate}", *[w for w in few if "early" not in w])
    assert alone.returncode == 0, alone.stderr
    files = [run / rundir.FINAL / "adapter_model.safetensors" for run in (tmp_path / winner, tmp_path / "runs/alone")]
    mine, its = map(load_file, files)
    assert all(mine[key].equal(its[key]) for key in its)

    again = run_llmkit("train", "name=half", *launcher, *few, *HALVING)
    assert "0 jobs to run" in again.stdout


@pytest.mark.parametrize(("dropout", "found"), [(0.1, "attn_pdrop"), (0.0, "")])
def test_a_base_with_dropout_of_its_own_is_known_whatever_its_adapter_has(dropout, found):
    """Its numbers would be drawn for the rows of all runs at once."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    from llmkit.training.pack.trunk import own_dropout

    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=dropout, **sizes))
    adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.5, fan_in_fan_out=True)

    assert own_dropout(peft.get_peft_model(model, adapter).get_base_model().base_model) == found
