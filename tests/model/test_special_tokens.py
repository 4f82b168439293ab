"""New tokens: their rows start as chosen, they alone are trained, and what is saved loads, generates and merges."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llmkit.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def loaded(shapes):
    """A function: shape -> the plain model, its tokenizer, and that tokenizer with chat-ml's tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmkit.model.tokenizer import set_chat_template

    def load(shape):
        before, tokenizer = (AutoTokenizer.from_pretrained(shapes[shape]) for _ in range(2))
        set_chat_template(tokenizer, "chat-ml")
        return AutoModelForCausalLM.from_pretrained(shapes[shape]), tokenizer, before

    return load


def matrices(model):
    return [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]


@pytest.mark.parametrize("shape", ["untied", "tied"])
def test_matrices_grow_by_the_new_tokens_and_keep_their_old_rows(loaded, shape):
    from llmkit.model.new_rows import add_rows

    model, tokenizer, before = loaded(shape)
    old = [matrix.clone() for matrix in matrices(model)]

    assert add_rows(model, tokenizer, before, init="similar", seed=0) == [640, 641]
    assert [tuple(matrix.shape) for matrix in matrices(model)] == [(642, 128)] * 2
    assert all(torch.equal(new[:640], was) for new, was in zip(matrices(model), old, strict=True))
    assert model.config.vocab_size == 642
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (shape == "tied")


def test_spare_rows_are_used_before_matrices_grow_and_start_like_new_ones(loaded):
    from llmkit.model.new_rows import add_rows

    model, tokenizer, before = loaded("spare")
    old = [matrix.clone() for matrix in matrices(model)]

    assert add_rows(model, tokenizer, before, init="similar", seed=0) == [640, 641]
    for new, was in zip(matrices(model), old, strict=True):
        assert new.shape == was.shape
        changed = (new != was).any(dim=1).nonzero().flatten().tolist()
        assert changed == [640, 641]


def test_a_model_without_new_tokens_stays_as_it_is(loaded):
    from llmkit.model.new_rows import add_rows

    model, _, before = loaded("untied")
    assert add_rows(model, before, before, init="similar", seed=0) == []
    assert model.config.vocab_size == 640


def test_rows_that_a_longer_tokenizer_lacked_are_made_too(loaded):
    """Some tokenizers are longer than their model: a token between old rows and new ones needs a row as well."""
    from llmkit.model.new_rows import add_rows

    model, tokenizer, before = loaded("untied")
    model.resize_token_embeddings(638)

    assert add_rows(model, tokenizer, before, init="similar", seed=0) == [638, 639, 640, 641]
    assert all(torch.isfinite(matrix).all() and len(matrix) == 642 for matrix in matrices(model))


@pytest.mark.parametrize("shape", ["untied", "tied"])
def test_similar_rows_are_the_mean_of_the_words_of_their_token(loaded, shape):
    from llmkit.model.new_rows import add_rows

    model, tokenizer, before = loaded(shape)
    spelt = [before(words, add_special_tokens=False)["input_ids"] for words in ("im start", "im end")]
    expected = [torch.stack([matrix[ids].mean(0) for ids in spelt]) for matrix in matrices(model)]

    add_rows(model, tokenizer, before, init="similar", seed=0)
    for matrix, rows in zip(matrices(model), expected, strict=True):
        torch.testing.assert_close(matrix[640:], rows)


@pytest.mark.parametrize(
    ("token", "words"), [("</USER>", "/ USER"), ("<USER>", "USER"), ("~~~", "~~~"), ("tool_call", "tool call")]
)
def test_a_token_is_spelt_with_its_words(tiny_tokenizer, token, words):
    from llmkit.model.new_rows import spell

    assert spell(token, tiny_tokenizer, limit=640) == tiny_tokenizer(words, add_special_tokens=False)["input_ids"]


def test_a_token_is_not_spelt_with_special_tokens(tiny_tokenizer):
    from llmkit.model.new_rows import spell

    assert spell("<|bos|>~", tiny_tokenizer, limit=640) == tiny_tokenizer("bos")["input_ids"]


def test_mean_rows_are_the_mean_of_all_rows_with_a_token(loaded):
    from llmkit.model.new_rows import add_rows

    model, tokenizer, before = loaded("spare")
    expected = [matrix[:640].mean(0) for matrix in matrices(model)]

    add_rows(model, tokenizer, before, init="mean", seed=0)
    for matrix, mean in zip(matrices(model), expected, strict=True):
        torch.testing.assert_close(matrix[640], mean)
        assert torch.equal(matrix[640], matrix[641])


def test_sampled_rows_are_as_long_as_others_and_follow_the_seed(loaded):
    from llmkit.model.new_rows import add_rows
    from llmkit.model.special_tokens import add_tokens

    def rows(seed):
        model, tokenizer, before = loaded("untied")
        add_tokens(tokenizer, [f"<{number}>" for number in range(60)])
        numbers = add_rows(model, tokenizer, before, init="sample", seed=seed)
        return [matrix[numbers] for matrix in matrices(model)], [matrix[:640] for matrix in matrices(model)]

    drawn, old = rows(1)
    for new, known in zip(drawn, old, strict=True):
        assert new.norm(dim=1).mean() == pytest.approx(float(known.norm(dim=1).mean()), rel=0.05)
        assert new.mean(dim=0).sub(known.mean(dim=0)).abs().max() < 5 * float(known.std()) / len(new) ** 0.5
    assert not torch.equal(*drawn)
    assert all(torch.equal(one, other) for one, other in zip(drawn, rows(1)[0], strict=True))
    assert not torch.equal(drawn[0], rows(2)[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_computed_in_float32_whatever_the_dtype_of_the_model(loaded, dtype):
    from llmkit.model.new_rows import add_rows

    model, tokenizer, before = loaded("untied")
    model = model.to(dtype)
    expected = model.lm_head.weight.data.float().mean(0).to(dtype)

    add_rows(model, tokenizer, before, init="mean", seed=0)
    assert model.lm_head.weight.dtype == dtype
    torch.testing.assert_close(model.lm_head.weight.data[640], expected, rtol=0, atol=0)


def changed_rows(before, after):
    return (before != after).any(dim=1).nonzero().flatten().tolist()


SHAPES = ["untied", "tied", "spare"]


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_trains_the_new_rows_and_no_other(start, learn, shape):
    run = start(shape)
    before = learn(run)

    after = dict(run.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    matrices_moved = {name for name in moved if "lora_" not in name}
    heads = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta.default"} if shape != "tied" else set()
    assert matrices_moved == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default",
        *heads,
    }
    assert all(changed_rows(before[name], after[name]) == [0, 1] for name in matrices_moved)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_freeze_trains_the_new_rows_and_no_other(start, learn, shape, precision):
    from llmkit.model.methods import count_parameters

    run = start(shape, "freeze", freeze={"last_n_layers": 1}, precision=precision)
    trainable, _ = count_parameters(run.model)
    if precision == "bf16":
        run.model.float()  # the few steps of this test run without autocast
    before = learn(run)

    after = dict(run.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name]) and "layers.2." not in name}
    assert moved == {"model.embed_tokens.weight", *([] if shape == "tied" else ["lm_head.weight"])}
    assert all(changed_rows(before[name], after[name]) == [640, 641] for name in moved)
    assert trainable == 196864 + len(moved) * 2 * 128


def test_freeze_that_trains_a_matrix_whole_trains_all_its_rows(start, learn):
    run = start("untied", "freeze", freeze={"last_n_layers": 0, "head": True}, weight_decay=0.0)
    before = learn(run)

    after = dict(run.model.named_parameters())
    assert len(changed_rows(before["lm_head.weight"], after["lm_head.weight"])) == 642
    assert changed_rows(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]) == [640, 641]


def test_freeze_with_weight_decay_would_move_other_rows_and_is_refused(start):
    with pytest.raises(ConfigError, match=r"training\.weight_decay=0\.1 with method=freeze and new tokens"):
        start("untied", "freeze", weight_decay=0.1)
    start("untied", "freeze", weight_decay=0.1, freeze={"embeddings": True, "head": True})


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_answers_as_the_model_did_in_memory(start, learn, deliver, answers, shape, method):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = start(shape, method, pad_token="[PAD]")
    learn(run, 20)
    logits, generated = answers(run.model, run.tokenizer)
    final = deliver(run) / "final"

    kind = AutoPeftModelForCausalLM if method == "lora" else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert tokenizer.pad_token == "[PAD]"
    again, generated_again = answers(model, tokenizer)
    assert torch.equal(again, logits)
    assert generated_again == generated


@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_adapter_is_the_adapter(start, learn, deliver, answers, shape, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = start(shape)
    learn(run, 20)
    logits, generated = answers(run.model, run.tokenizer)
    final = deliver(run) / "final"

    AutoPeftModelForCausalLM.from_pretrained(final).merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (shape == "tied")
    again, generated_again = answers(merged, AutoTokenizer.from_pretrained(final))
    assert (again - logits).abs().max() / logits.abs().max() < 1e-5
    assert generated_again == generated


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_holds_the_new_rows_and_not_the_matrices(start, deliver, shape):
    saved = load_file(deliver(start(shape)) / "final" / "adapter_model.safetensors")

    rows = {name: tuple(tensor.shape) for name, tensor in saved.items() if "lora_" not in name}
    suffix = "token_adapter.trainable_tokens_delta"
    heads = {} if shape == "tied" else {f"base_model.model.lm_head.{suffix}": (2, 128)}
    assert rows == {f"base_model.model.model.embed_tokens.{suffix}": (2, 128), **heads}


def test_plain_peft_on_a_base_without_the_rows_fails_and_does_not_answer_wrongly(start, deliver, shapes):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    final = deliver(start("untied")) / "final"
    with pytest.raises(IndexError):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shapes["untied"]), final)


@pytest.mark.parametrize(("bits", "shape"), [(4, "untied"), (8, "untied"), (4, "tied")])
def test_a_quantized_base_takes_new_rows(start, learn, deliver, answers, bits, shape):
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    from llmkit.model.loading import keep_weights_unpacked

    run = start(shape, "qlora", bits=bits)
    before = learn(run, 5)
    after = dict(run.model.named_parameters())
    rows = [name for name in before if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if shape == "tied" else 2)
    assert not any(torch.equal(before[name], after[name]) for name in rows)
    logits, _ = answers(run.model, run.tokenizer)
    final = deliver(run) / "final"

    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
    if bits == 4:
        settings.bnb_4bit_use_double_quant = True
    model = AutoPeftModelForCausalLM.from_pretrained(final, quantization_config=settings, dtype=torch.float32)
    keep_weights_unpacked(model)
    again, _ = answers(model, run.tokenizer)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["untied", "tied"])
@pytest.mark.filterwarnings("ignore")
def test_trls_loss_is_that_of_the_model_and_reaches_the_rows(start, shape, tmp_path):
    """TRL computes its loss from the head's weight, past the head's own forward."""
    from accelerate.state import AcceleratorState, PartialState
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    AcceleratorState._reset_state()
    PartialState._reset_state()
    run = start(shape)
    ids = run.tokenizer.apply_chat_template([{"role": "assistant", "content": "Hello."}], return_dict=True)["input_ids"]
    rows = Dataset.from_list([{"input_ids": ids, "labels": [-100] * 2 + ids[2:]}] * 2)
    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None, max_steps=2,
        dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    trainer = SFTTrainer(model=run.model, args=arguments, train_dataset=rows, processing_class=run.tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    run.model.eval()

    def loss_and_gradients(**keywords):
        run.model.zero_grad()
        loss = run.model(**batch, **keywords).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in run.model.named_parameters() if p.requires_grad}

    fused, gradients = loss_and_gradients(fused_lm_head=True)
    plain, expected = loss_and_gradients()
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    rows_of = {name: gradient for name, gradient in gradients.items() if "token_adapter" in name}
    assert len(rows_of) == (1 if shape == "tied" else 2)
    assert all(gradient.abs().sum() > 0 for gradient in rows_of.values())
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters() if name in rows_of}
    run.model.zero_grad()
    trainer.train()
    after = dict(run.model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ("tied", {"modules_to_save": ["lm_head"]}, "lora.modules_to_save=['lm_head'] with new tokens: the head of"),
        ("untied", {"target_modules": ["q_proj", "embed_tokens"]}, "an adapter on model.embed_tokens or lm_head does"),
    ],
)
def test_settings_that_would_lose_the_new_rows_are_refused(start, shape, settings, said):
    with pytest.raises(ConfigError) as error:
        start(shape, lora=settings)
    assert said in str(error.value)


def test_a_head_that_is_trained_whole_trains_its_new_rows_with_it(start, learn, deliver, answers):
    from peft import AutoPeftModelForCausalLM

    run = start("untied", lora={"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]})
    before = learn(run, 5)
    after = dict(run.model.named_parameters())
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    assert len(changed_rows(before[head], after[head])) == 642
    logits, _ = answers(run.model, run.tokenizer)

    final = deliver(run) / "final"
    assert json.loads((final / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "model.embed_tokens": [640, 641]
    }
    again, _ = answers(AutoPeftModelForCausalLM.from_pretrained(final), run.tokenizer)
    assert torch.equal(again, logits)


def test_a_head_with_a_bias_cannot_train_single_rows(start):
    """PEFT's wrapper of the head drops its bias (phi-2 has one)."""
    from transformers import MistralForCausalLM

    from llmkit.config.schema import LoraConfig
    from llmkit.model.adapters import token_indices

    model = MistralForCausalLM(start().model.config)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with pytest.raises(ConfigError, match=r"head of MistralForCausalLM has a bias.*modules_to_save=\[lm_head\]"):
        token_indices(model, LoraConfig(), [640])
    assert token_indices(model, LoraConfig(modules_to_save=["lm_head"]), [640]) == {"model.embed_tokens": [640]}


def test_the_code_of_the_card_loads_merges_and_ends_answers(start, learn, deliver, answers, tmp_path):
    """The card's two blocks are run as they stand; DIRECTORY and MERGED are for its reader to fill in."""
    import re

    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = start()
    end = run.tokenizer.convert_tokens_to_ids("<|im_end|>")
    run.model.generation_config.eos_token_id = [end]
    learn(run, 60)
    logits, generated = answers(run.model, run.tokenizer)
    assert generated[-1] == end
    final = deliver(run) / "final"

    card = (final / "README.md").read_text()
    assert "- new tokens: 2\n" in card
    names = {"DIRECTORY": str(final), "MERGED": str(tmp_path / "merged")}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, names)
    assert answers(names["model"], run.tokenizer)[1] == generated
    merged = AutoModelForCausalLM.from_pretrained(names["MERGED"])
    again, generated_again = answers(merged, AutoTokenizer.from_pretrained(names["MERGED"]))
    assert (again - logits).abs().max() / logits.abs().max() < 1e-5
    assert generated_again == generated
