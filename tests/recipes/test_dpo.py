"""What recipe=dpo promises: the reference is the policy at the start, and the result prefers the chosen answers."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmkit.config.schema import DPO_LOSSES, FIGURES_OF_RECIPE
from llmkit.errors import NonFiniteError, Stopped

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs

DPO, MEASURED = "recipe=dpo", ("evaluation.baseline=true", "evaluation.examples=40")
LOG2 = math.log(2)
REAL = Path(__file__).parents[2] / "../shared/data/llama-factory/dpo_en_demo.json"


@pytest.fixture(scope="module")
def demo(train):
    return train(DPO, "evaluation=default", "training.max_steps=60")


def held_out(run):
    """The held-out pairs as the recipe prepares them."""
    from llmkit.data.prepare import prepare_data
    from llmkit.model.loading import load_tokenizer

    tokenizer = load_tokenizer(run.config.model, "keep-original")
    data = prepare_data(run.config.data, tokenizer, max_length=2048, preference=True)
    return data.validation.dataset, tokenizer


def log_prob(model, prompt, completion):
    """log p(completion | prompt) by plain Transformers, one sequence at a time."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logs = model.eval()(input_ids=ids).logits.float().log_softmax(-1)[0]
    return sum(logs[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


def test_the_demo_learns_to_prefer_what_was_chosen_on_pairs_it_never_saw(demo):
    base, result = demo.result["base"], demo.result

    assert 0.4 <= base["preference_accuracy"] <= 0.6
    assert result["preference_accuracy"] > 0.9
    assert result["train_preference_accuracy"] > 0.9
    assert result["objective"] == result["eval_loss"] < 0.1 < base["eval_loss"] == pytest.approx(LOG2, rel=1e-6)
    assert result["exact_match"] is None


def test_the_figures_of_a_recipe_are_those_that_may_be_objectives(demo, train):
    other = train("evaluation.examples=1", "evaluation.max_new_tokens=1", "training.max_steps=1")

    for run in (demo, other):
        names = FIGURES_OF_RECIPE[run.config.recipe]
        assert all(run.result[name] is not None for name in names)
        measured = {key for record in run.metrics() for key in record}
        assert {*names, "eval_loss"} <= measured


def test_the_accuracy_is_that_of_plain_log_probabilities(demo):
    import peft

    model = peft.AutoPeftModelForCausalLM.from_pretrained(demo.final)
    pairs, _ = held_out(demo)
    right = [
        log_prob(model, pair["prompt_ids"], pair["chosen_ids"])
        > log_prob(model, pair["prompt_ids"], pair["rejected_ids"])
        for pair in pairs
    ]

    assert demo.result["preference_accuracy"] == pytest.approx(sum(right) / len(right))


def test_rewards_and_log_probabilities_are_logged(demo):
    keys = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")}
    keys |= {"rewards/margins", "rewards/accuracies"}

    (last,) = [record for record in demo.metrics() if record["step"] == 60 and "loss" in record]
    (evaluation,) = [record for record in demo.metrics() if record["step"] == 60 and "eval_loss" in record]
    assert keys <= last.keys()
    assert {f"eval_{key}" for key in keys} <= evaluation.keys()
    assert evaluation["eval_rewards/margins"] > 1


@pytest.mark.skipif(not REAL.exists(), reason="the shared data is not on this machine")
def test_a_real_preference_file_trains(train):
    words = ("data.limit=12", "data.on_overlong=drop", "data.max_length=1500", "training.global_batch_size=2")
    run = train(DPO, f"data.path={REAL}", "data.validation=0.2", "training.max_steps=2", *words, *MEASURED)

    assert run.result["base"]["eval_loss"] == pytest.approx(LOG2, abs=1e-4)
    assert run.result["steps"] == 2
    assert run.result["preference_accuracy"] is not None


def test_tokens_count_both_sides_of_every_pair(train):
    from llmkit.data.prepare import prepare_data
    from llmkit.model.loading import load_tokenizer

    run = train(DPO, "training.num_train_epochs=1", "training.max_steps=null")
    data = prepare_data(
        run.config.data, load_tokenizer(run.config.model, "keep-original"), max_length=64, preference=True
    )

    sides = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in data.train.dataset)
    assert run.result["tokens"] == sides


def test_samples_show_answers_to_the_prompts_of_pairs(demo):
    samples = [json.loads(line) for line in (demo.run_dir / "samples.jsonl").read_text().splitlines()]
    example = json.loads((demo_file("validation")).read_text().splitlines()[0])

    assert (samples[0]["prompt"], samples[0]["expected"]) == (example["prompt"], example["chosen"])


def demo_file(part):
    from llmkit.data.reading.sources import shipped_demo

    return shipped_demo(part).with_name(f"preference_{part}.jsonl")


REFERENCES = {
    "lora": [],
    "qlora": ["method=qlora"],
    "full": ["method=full"],
    "freeze": ["method=freeze", "freeze.last_n_layers=1"],
    "modules to save": ["lora.modules_to_save=[lm_head]", "lora.target_modules=[q_proj]"],
    "dora": ["lora.use_dora=true"],
    "pissa": ["lora.init_lora_weights=pissa"],
    "a random adapter": ["lora.init_lora_weights=false"],
    "precomputed": ["dpo.precompute_ref_log_probs=true"],
    "precomputed, full": ["method=full", "dpo.precompute_ref_log_probs=true"],
    "precomputed, pissa": ["lora.init_lora_weights=pissa", "dpo.precompute_ref_log_probs=true"],
    "checkpointing": ["training.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("words", REFERENCES.values(), ids=REFERENCES)
def test_the_reference_is_the_policy_at_the_start_and_stays_it(train, trainers, demo, words):
    run = train(DPO, *words, *MEASURED, "training.logging_steps=1")
    (trainer,) = trainers

    before = next(record for record in run.metrics() if "eval_loss" in record)
    untouched = next(record for record in demo.metrics() if "eval_loss" in record)["eval_logps/chosen"]
    if words != ["lora.init_lora_weights=false"]:  # which starts elsewhere
        rough = 3e-2 if words == ["method=qlora"] else 1e-4
        assert before["eval_logps/chosen"] == pytest.approx(untouched, rel=rough)
    assert before["eval_loss"] == pytest.approx(LOG2, abs=1e-5)
    assert before["eval_rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert run.result["eval_loss"] < LOG2 - 0.01  # the policy has moved

    batch = trainer.data_collator(list(trainer.eval_dataset))
    if "ref_chosen_logps" in batch:
        chosen, rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    else:
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    assert chosen.mean().item() == pytest.approx(before["eval_logps/chosen"], rel=1e-5)
    assert rejected.mean().item() == pytest.approx(before["eval_logps/rejected"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the model with the adapter switched off"),
        (["method=qlora"], "the model with the adapter switched off"),
        (["lora.init_lora_weights=pissa"], "a frozen copy of the adapter"),
        (["method=full"], "a frozen copy of what is trained, 3 MiB"),
        (["method=freeze", "freeze.last_n_layers=1"], "a frozen copy of what is trained, 1 MiB"),
        (["method=full", "dpo.precompute_ref_log_probs=true"], "precomputed, not kept in memory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_only_what_is_trained_in_full_is_there_twice(train, trainers, capsys, words, said):
    train(DPO, *words, "training.max_steps=1")
    (trainer,) = trainers

    assert f"reference  {said}" in capsys.readouterr().out
    assert (trainer.ref_model is not None) == said.startswith("a frozen copy of what")
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = [name for name, p in trainer.model.named_parameters() if id(p) in optimized or p.requires_grad]
    assert names
    assert not [name for name in names if ".ref." in name]
    assert not list(trainer.run_dir.rglob("*.arrow"))


PLAIN = (DPO, "data.limit=16", "data.validation=null", "training.max_steps=2", "training.warmup_steps=0")


@pytest.fixture(scope="module")
def plain_loss(train):
    return train(*PLAIN).result["train_loss"]


EXPECTED_AT_FIRST = {  # at beta=0.2, label_smoothing=0.1: policy and reference agree, all differences are 0
    **dict.fromkeys(("sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"), LOG2),
    "hinge": 1.0,
    "ipo": (1 / 0.4) ** 2,
    "exo_pair": -LOG2 - 0.5 * (math.log(0.9) + math.log(0.1)),
    "nca_pair": 2 * LOG2,
    "bco_pair": 2 * LOG2,
    "sppo_hard": 2 * 2.5**2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG2 + 0.5,
    "sft": None,  # the negative log-likelihood of the chosen tokens
}


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_every_loss_trains_and_begins_at_its_own_value(train, loss):
    words = (f"dpo.loss_type={loss}", "dpo.beta=0.2", "dpo.label_smoothing=0.1", "data.validation=null")
    run = train(DPO, *words, "data.limit=16", "training.max_steps=1", "training.warmup_steps=0")

    (record,) = [record for record in run.metrics() if "loss" in record]
    expected = EXPECTED_AT_FIRST[loss] or -record["logps/chosen"] / (run.result["tokens"] / 90)
    assert record["loss"] == pytest.approx(expected, rel=1e-5 if EXPECTED_AT_FIRST[loss] else 0.5)
    assert 0 < record["grad_norm"] < math.inf


def test_losses_add_up_by_their_weights(train):
    losses = ("dpo.loss_type=[hinge,apo_zero]", "dpo.loss_weights=[0.5,3]", "data.limit=16", "data.validation=null")

    assert train(DPO, *losses, "training.max_steps=1").result["train_loss"] == pytest.approx(0.5 + 3)


@pytest.mark.parametrize(
    "words",
    [
        ["dpo.f_divergence_type=forward_kl"],
        ["dpo.f_divergence_type=js_divergence"],
        ["dpo.f_divergence_type=alpha_divergence", "dpo.f_alpha_divergence_coef=0.3"],
        ["dpo.use_weighting=true"],
        ["dpo.ld_alpha=0.5"],
        ["dpo.loss_type=discopop", "dpo.discopop_tau=1"],
        ["dpo.beta=0.3"],
        ["dpo.disable_dropout=false", "lora.lora_dropout=0.2"],
    ],
    ids=lambda words: words[0],
)
def test_every_setting_reaches_the_training(train, plain_loss, words):
    assert train(*PLAIN, *words).result["train_loss"] != pytest.approx(plain_loss, rel=1e-4)


def test_dropout_is_off_by_default(train, plain_loss):
    assert train(*PLAIN, "lora.lora_dropout=0.5").result["train_loss"] == plain_loss


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_reference_asked_before_training_trains_like_one_that_is_kept(train, method):
    words = (DPO, f"method={method}", "dpo.ld_alpha=0.5", "training.logging_steps=1")
    kept, asked = train(*words), train(*words, "dpo.precompute_ref_log_probs=true")

    for left, right in zip(kept.metrics(), asked.metrics(), strict=True):
        for key in {"loss", "eval_loss", "rewards/margins"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-6), (left["step"], key)


def test_a_stop_while_the_reference_is_precomputed_ends_the_run_at_once(train, tmp_path):
    from llmkit.training.stopping import StopRequest

    class AskedForBetweenBatches(StopRequest):
        asked = 0

        @property
        def signal(self):
            self.asked += 1
            return "SIGTERM" if self.asked > 3 else None

        @signal.setter
        def signal(self, value):
            pass

    with pytest.raises(Stopped, match="stopped by SIGTERM while the reference was precomputed"):
        train(DPO, "dpo.precompute_ref_log_probs=true", run_dir=tmp_path / "run", stop=AskedForBetweenBatches())

    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_evaluation_does_not_depend_on_its_batch_size(train, loss):
    records = []
    for size in (3, 16, 40):
        run = train(DPO, "training.max_steps=2", f"training.per_device_eval_batch_size={size}", f"dpo.loss_type={loss}")
        records.append(next(r for r in reversed(run.metrics()) if "eval_loss" in r))

    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen"):
        assert [record[key] for record in records] == pytest.approx([records[0][key]] * 3, rel=1e-4), key


def test_accumulating_small_batches_equals_one_large_batch_also_where_they_do_not_divide(train):
    words = (DPO, "data.limit=10", "data.validation=null", "training.logging_steps=1")  # 10 = 4 + 4 + 2
    one = train(*words, "training.per_device_train_batch_size=12", "training.gradient_accumulation_steps=1")
    many = train(*words, "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=3")

    for left, right in zip(one.metrics(), many.metrics(), strict=True):
        for key in {"loss", "grad_norm", "rewards/margins"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-6), (left["step"], key)


def test_training_stops_at_the_first_non_finite_value_and_keeps_the_pairs(train, tmp_path):
    run_dir = tmp_path / "run"

    with pytest.raises(NonFiniteError, match=r"step \d+.*not a finite number.*learning_rate"):
        train(DPO, "method=full", "training.learning_rate=1e37", "training.max_steps=20", run_dir=run_dir)

    (batch,) = json.loads((run_dir / "nonfinite_batch.json").read_text())["batches"]
    assert len(batch["texts"]) == 2 * 16
    assert "<|assistant|>" in batch["texts"][0]
    learnt = [label for label in batch["labels"][0] if label != -100]
    assert learnt == batch["input_ids"][0][batch["labels"][0].index(learnt[0]) :][: len(learnt)]


def test_final_best_holds_the_weights_of_the_best_evaluation(train):
    words = ("training.learning_rate=0.05", "training.lr_scheduler_type=constant", "training.eval_steps=2")
    run = train(DPO, *words, "method=full", "training.max_steps=8", "training.final=best", "evaluation.examples=40")

    losses = [r["eval_loss"] for r in run.metrics() if "eval_loss" in r]
    assert run.result["final_is"] == "best"
    assert run.result["eval_loss"] == min(losses)
    assert run.result["preference_accuracy"] is not None


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_arithmetic_leaves_trained_weights_in_float32(train, method):
    run = train(DPO, f"method={method}", "precision=bf16", *MEASURED)

    assert run.result["base"]["eval_loss"] == pytest.approx(LOG2, abs=5e-3)
    weights = load_file(next(run.final.glob("*model.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
