"""An adapter that a run starts from is continued as it was: one adapter, its own base, tokenizer and template."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llmkit.errors import ConfigError

SHAPES = ["untied", "tied", "spare"]


@pytest.fixture
def finished(start, learn, deliver):
    """A function: shape, method and settings -> a trained run and its directory."""

    def make(shape="untied", method="lora", steps=10, **settings):
        run = start(shape, method, **settings)
        learn(run, steps)
        return run, deliver(run)

    return make


@pytest.mark.parametrize("shape", SHAPES)
def test_a_continued_adapter_starts_as_it_ended(finished, start, answers, shape):
    run, directory = finished(shape)

    again = start(init_from=directory)
    assert torch.equal(answers(again.model, again.tokenizer)[0], answers(run.model, run.tokenizer)[0])
    assert list(again.model.peft_config) == ["default"]
    assert again.rows == run.rows
    assert again.tokenizer.chat_template == run.tokenizer.chat_template


@pytest.mark.parametrize("shape", SHAPES)
def test_a_continued_adapter_is_trained_and_saved_as_one_adapter_on_the_first_base(
    finished, start, learn, deliver, answers, shapes, shape
):
    from peft import AutoPeftModelForCausalLM

    first, directory = finished(shape)
    again = start(init_from=directory)
    before = learn(again, 5)
    trained = {name for name, parameter in again.model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, p in first.model.named_parameters() if p.requires_grad}
    after = dict(again.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained

    final = deliver(again, "second") / "final"
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(shapes[shape])
    logits, _ = answers(again.model, again.tokenizer)
    loaded = AutoPeftModelForCausalLM.from_pretrained(final)
    assert torch.equal(answers(loaded, again.tokenizer)[0], logits)


def test_an_adapter_without_new_tokens_is_continued_too(finished, start, answers):
    run, directory = finished(chat_template="keep-original")

    again = start(init_from=directory)
    assert again.rows == []
    assert torch.equal(answers(again.model, again.tokenizer)[0], answers(run.model, run.tokenizer)[0])


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_full_run_is_the_base_of_a_new_adapter(finished, start, learn, deliver, answers, method):
    from peft import AutoPeftModelForCausalLM

    run, directory = finished(method=method)
    again = start(init_from=directory)
    assert again.rows == []  # its tokens are not new any more
    assert torch.equal(answers(again.model, again.tokenizer)[0], answers(run.model, run.tokenizer)[0])

    learn(again)
    final = deliver(again, "second") / "final"
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        directory / "final"
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(final)
    assert torch.equal(answers(loaded, again.tokenizer)[0], answers(again.model, again.tokenizer)[0])


def test_a_full_run_is_continued_in_full(finished, start, answers):
    run, directory = finished(method="full")

    again = start(method="full", init_from=directory)
    assert torch.equal(answers(again.model, again.tokenizer)[0], answers(run.model, run.tokenizer)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_quantized_base_is_continued_on_it(finished, start, answers, bits):
    run, directory = finished(method="qlora", bits=bits, steps=3)

    again = start(method="qlora", bits=bits, init_from=directory)
    logits, expected = answers(again.model, again.tokenizer)[0], answers(run.model, run.tokenizer)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_tokens_that_the_adapter_does_not_hold_are_refused(finished, start):
    _, directory = finished(steps=0)

    with pytest.raises(ConfigError, match="new tokens that the adapter does not hold"):
        start(init_from=directory, special_tokens=["<Q>"])


def test_an_adapter_that_does_not_fit_its_base_is_named(finished, start, shapes):
    _, directory = finished(steps=0)
    weights = directory / "final" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(ConfigError, match=rf"init_from={directory}/final: "):
        start(init_from=directory)


def test_an_adapter_from_elsewhere_with_the_short_form_of_its_rows_is_continued(
    start, learn, answers, shapes, tmp_path
):
    """PEFT takes a bare list of rows for the input embeddings, and key names without the path to the module."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shapes["tied"])
    tokenizer.add_tokens(["<Q>"], special_tokens=True)
    base = AutoModelForCausalLM.from_pretrained(shapes["tied"])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[640], task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str(shapes["tied"])
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path)

    ours = start(init_from=tmp_path)
    assert ours.rows == [640]
    assert torch.equal(answers(ours.model, ours.tokenizer)[0], answers(theirs, tokenizer)[0])


@pytest.mark.parametrize("shape", ["untied", "tied"])
def test_a_copy_of_a_continued_adapter_has_its_rows(finished, start, answers, shape):
    """As TRL makes its reference for DPO: another adapter of the same settings, with the same parameters copied."""
    run, directory = finished(shape)
    again = start(init_from=directory).model
    again.add_adapter("ref", again.peft_config["default"])
    for name, parameter in again.named_parameters():
        if ".default." in name:  # the rows of new tokens are named otherwise, and left out
            again.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)

    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if parameter.requires_grad and name.endswith(("default", "default.weight")):
                parameter.add_(1.0)
    again.set_adapter("ref")
    assert torch.equal(answers(again, run.tokenizer)[0], answers(run.model, run.tokenizer)[0])


@pytest.mark.parametrize("shape", ["untied", "tied"])
def test_without_its_adapter_the_model_is_the_base_with_the_rows_as_they_started(start, learn, answers, shape):
    """DPO's reference of a new adapter; its loss reads the head's weight directly."""
    run = start(shape)
    before, _ = answers(run.model, run.tokenizer)
    learn(run, 5)

    with run.model.disable_adapter():
        after, _ = answers(run.model, run.tokenizer)
        head = run.model.get_output_embeddings()
        assert head.weight is head.original_module.weight
    torch.testing.assert_close(after, before)
    assert not torch.allclose(answers(run.model, run.tokenizer)[0], before)


def test_a_checkpoint_of_an_adapter_with_new_rows_holds_no_matrix(start, tmp_path):
    """The trainer saves checkpoints without naming what to leave out."""
    run = start()
    run.model.save_pretrained(tmp_path)

    assert {tensor.shape[0] for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}.isdisjoint(
        {640, 642}
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_making_a_trainer_leaves_the_adapter_of_a_quantized_model_as_it_was(start, bits, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from llmkit.model.methods import trained_weights_kept

    run = start(method="qlora", bits=bits)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    with trained_weights_kept(run.model):
        SFTTrainer(model=run.model, args=arguments, train_dataset=rows, processing_class=run.tokenizer)
        inside = {p.dtype for p in run.model.parameters() if p.requires_grad}
    after = dict(run.model.named_parameters())
    assert torch.bfloat16 in inside  # else the work-around has nothing to do any more
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
