"""DPO from the run directory of an SFT run, and DPO that goes on after a stop: the reference stays what it was."""

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs

DPO = "recipe=dpo"


@pytest.fixture(scope="module")
def sft(train):
    """A function: the words of an SFT run -> its run directory; each is trained once."""
    done = {}

    def run(*words):
        if words not in done:
            done[words] = train(*words, "training.max_steps=6", "lora.r=4" if "method=full" not in words else "seed=1")
            finish(done[words])
        return done[words]

    return run


def finish(run):
    """What the worker writes when the recipe has returned."""
    from llmkit import rundir

    rundir.write_result(run.run_dir, **run.result)


def adapter(run):
    return load_file(run.final / "adapter_model.safetensors")


def log_probs(model, batch):
    """log p of each completion by plain Transformers."""
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    logs = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (logs * batch["completion_mask"][:, 1:]).sum(1)


CONTINUED = {
    "an adapter": ((), ()),
    "an adapter on a quantized base": (("method=qlora",), ("method=qlora",)),
    "an adapter with new tokens": (("data.special_tokens=[<|a|>,<|b|>]",), ()),
    "an adapter with modules to save": (("lora.modules_to_save=[lm_head]",), ()),
    "an adapter on embeddings": (("lora.target_modules=[embed_tokens,q_proj]",), ()),
    "an adapter, reference asked before": ((), ("dpo.precompute_ref_log_probs=true",)),
    "a full model": (("method=full",), ("method=full",)),
    "a full model, frozen in part": (("method=full",), ("method=freeze",)),
    "a full model, with a new adapter": (("method=full",), ("lora.r=2",)),
}


@pytest.mark.parametrize(("before", "words"), CONTINUED.values(), ids=CONTINUED)
def test_the_reference_is_the_sft_policy_and_stays_it(train, trainers, sft, before, words):
    from transformers import AutoModelForCausalLM

    start = sft(*before)
    run = train(DPO, f"init_from={start.run_dir}", *words, "evaluation.baseline=true", "training.logging_steps=1")
    (trainer,) = trainers

    first = next(record for record in run.metrics() if "eval_loss" in record)
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert run.result["eval_loss"] < 0.69
    batch = trainer.data_collator(list(trainer.eval_dataset))
    if "ref_chosen_logps" in batch:
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
    if "method=qlora" in words:  # the base is loaded unquantized below, so the values are only near
        assert (reference[: len(reference) // 2].mean().item()) == pytest.approx(first["eval_logps/chosen"], rel=1e-4)
        return
    if (start.final / "adapter_config.json").exists():
        import peft

        policy = peft.AutoPeftModelForCausalLM.from_pretrained(start.final)
    else:
        policy = AutoModelForCausalLM.from_pretrained(start.final)
    torch.testing.assert_close(reference, log_probs(policy, batch), rtol=1e-4, atol=1e-3)


def test_an_adapter_is_continued_not_stacked_and_the_reference_stays_out_of_final(train, trainers, sft):
    start = sft()
    run = train(DPO, f"init_from={start.run_dir}")
    (trainer,) = trainers

    assert run.config.lora.r == 4
    assert adapter(run).keys() == adapter(start).keys()
    assert any(not torch.equal(adapter(run)[name], values) for name, values in adapter(start).items())
    assert not (run.final / "ref").exists()
    assert trainer.ref_model is None
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in trainer.model.named_parameters() if id(p) in optimized}
    assert len(trained) == len(adapter(run))


def test_the_adapter_of_a_quantized_run_goes_on_unrounded(train, sft):
    start = sft("method=qlora")
    run = train(DPO, f"init_from={start.run_dir}", "method=qlora", "training.max_steps=1")  # at a learning rate of 0

    assert all(torch.equal(adapter(run)[name], values) for name, values in adapter(start).items())


RESUMED = {
    "lora, dropout": ["dpo.disable_dropout=false", "lora.lora_dropout=0.1"],
    "pissa": ["lora.init_lora_weights=pissa"],
    "qlora": ["method=qlora"],
    "full": ["method=full"],
    "full, precomputed": ["method=full", "dpo.precompute_ref_log_probs=true"],
    "continued": ["init_from"],
    "continued, precomputed": ["init_from", "dpo.precompute_ref_log_probs=true"],
}


@pytest.mark.parametrize("words", RESUMED.values(), ids=RESUMED)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(train, sft, tmp_path, monkeypatch, words):
    from llmkit.training.callbacks import Saving
    from llmkit.training.stopping import StopRequest

    words = [DPO, *(f"init_from={sft().run_dir}" if word == "init_from" else word for word in words)]
    words += ["training.max_steps=4", "training.logging_steps=1", "training.eval_steps=4", "evaluation.baseline=true"]
    stop, end_of_step = StopRequest(), Saving.on_step_end

    def ask_at_step_2(callback, args, state, control, **more):
        stop.signal = "SIGINT" if state.global_step == 2 else None
        end_of_step(callback, args, state, control, **more)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Saving, "on_step_end", ask_at_step_2)
        stopped = train(*words, run_dir=run_dir, stop=stop)
    assert stopped.result["status"] == "preempted"
    resumed, straight = train(*words, run_dir=run_dir), train(*words)

    assert [r["step"] for r in resumed.metrics() if "loss" in r] == [1, 2, 3, 4]
    timed = {"tokens_per_second", "eval_seconds"}
    for left, right in zip(resumed.metrics(), straight.metrics(), strict=True):
        assert {k: v for k, v in left.items() if k not in timed} == {k: v for k, v in right.items() if k not in timed}
    assert resumed.result["base"] == straight.result["base"]
    ours, theirs = (load_file(next(run.final.glob("*model.safetensors"))) for run in (resumed, straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_holds_one_adapter(train, sft, tmp_path):
    train(DPO, f"init_from={sft().run_dir}", "training.save_steps=4", run_dir=tmp_path / "run")

    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not [path for path in checkpoint.rglob("*") if path.is_dir()]
