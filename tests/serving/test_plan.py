"""The command that follows from a target and `serve.*`, and what is found wrong before anything is started."""

import dataclasses
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from ports import free_port

from llmkit.config.schema import HardwareConfig, ModelConfig, ServeConfig, TrainConfig
from llmkit.errors import ConfigError
from llmkit.serving.causes import explain
from llmkit.serving.checks import check
from llmkit.serving.environment import Environment, find_environment
from llmkit.serving.model_facts import ModelFacts, read_model
from llmkit.serving.plan import make_plan
from llmkit.serving.servable import unservable, why_merged
from llmkit.serving.target import of_model, of_run

ON_GPU = Environment("python", "0.32.0", for_cpu=False)
ON_CPU = Environment("python", "0.32.0", for_cpu=True)


def plan_of(*targets, environment=ON_CPU, **serve):
    config = TrainConfig(serve=ServeConfig(**{"port": free_port(), "kv_cache_gib": 0.5} | serve))
    return make_plan({target.name: target for target in targets}, config, environment)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_an_adapter_is_served_beside_its_base_with_its_own_template_and_end_tokens(tuned_run):
    words = plan_of(of_run(tuned_run)).arguments()

    assert Path(value(words, "--model"), "config.json").is_file()
    assert json.loads(value(words, "--lora-modules")) == {"name": "tuned", "path": str(tuned_run / "final")}
    assert value(words, "--chat-template") == str(tuned_run / "final" / "chat_template.jinja")
    assert value(words, "--generation-config") == str(tuned_run / "final")
    assert value(words, "--max-lora-rank") == "8", "rank 4 is rounded up to what vLLM takes"
    assert "--tokenizer" not in words
    assert value(words, "--dtype") == "float32", "as it was trained"


def test_a_whole_model_is_served_under_its_name(tiny_model_dir):
    words = plan_of(of_model(ModelConfig(path=str(tiny_model_dir))), served_model_name="x").arguments()

    assert value(words, "--served-model-name") == tiny_model_dir.name
    assert "--enable-lora" not in words


def test_settings_reach_vllm_under_its_own_names(tiny_model_dir):
    target = of_model(ModelConfig(path=str(tiny_model_dir)))
    plan = plan_of(
        target, devices="0,1", tensor_parallel_size=2, dtype="bf16", max_num_seqs=7, enforce_eager=True,
        enable_prefix_caching=False, extra_args=["--seed", "3"], environment=ON_GPU,
    )  # fmt: skip
    words = plan.arguments()

    assert [value(words, flag) for flag in ("--tensor-parallel-size", "--dtype", "--max-num-seqs", "--seed")] == [
        *("2", "bfloat16", "7", "3")
    ]
    assert {"--enforce-eager", "--no-enable-prefix-caching", "--disable-fastapi-docs"} <= set(words)
    assert plan.variables()["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_the_command_for_a_container_mounts_what_it_reads(tuned_run):
    command = plan_of(of_run(tuned_run)).in_container()

    assert f"-v {tuned_run / 'final'}:{tuned_run / 'final'}:ro" in command
    assert "-e VLLM_API_KEY " in command, "by name: the value comes from the environment"


def test_adapters_of_different_templates_are_not_served_together(tuned_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tuned_run, other)
    template = other / "final" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# #}", encoding="utf-8")

    with pytest.raises(ConfigError, match="different chat templates"):
        plan_of(of_run(tuned_run), of_run(other))


# --- adapters that vLLM does not take ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [
        ({"trainable_token_indices": {"model.embed_tokens": [640]}}, "rows of new tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head)"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"bias": "all"}, "trained biases (bias=all)"),
        ({"r": 513}, "rank 513 (at most 512)"),
        ({"r": 8, "init_lora_weights": "gaussian", "bias": "none"}, None),
    ],
)
def test_what_vllm_does_not_serve_beside_a_base_is_known(settings, obstacle):
    assert unservable(settings) == obstacle


def test_vllm_has_no_place_for_rows_of_new_tokens():
    utils = pytest.importorskip("vllm.lora.utils")
    with pytest.raises(ValueError, match="unsupported LoRA weight"):
        utils.parse_fine_tuned_lora_name("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta")


def test_such_an_adapter_is_merged_and_is_refused_where_it_must_not_be(tuned_run):
    target = dataclasses.replace(of_run(tuned_run), adapter={"use_dora": True})

    assert why_merged(target, "auto") == "vLLM does not serve DoRA beside a base"
    with pytest.raises(ConfigError, match=r"serve.adapter=unmerged: vLLM does not serve DoRA"):
        why_merged(target, "unmerged")


def test_an_adapter_of_a_quantized_base_is_merged_unless_the_user_says_otherwise(tuned_run):
    target = of_run(tuned_run)
    target.run.qlora = object()

    assert "quantized base" in why_merged(target, "auto")
    assert why_merged(target, "unmerged") is None


# --- checks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_model_dir):
    return of_model(ModelConfig(path=str(tiny_model_dir)))


def problems(plan, **hardware) -> str:
    with pytest.raises(ConfigError) as error:
        check(plan, HardwareConfig(**hardware))
    return str(error.value)


def test_what_fits_is_said_with_its_numbers(tiny):
    plan, facts, warnings = check(plan_of(tiny, kv_cache_gib=0.5), HardwareConfig(memory_gib=8))

    assert re.fullmatch(r"weights 1\.4 MiB, KV cache 0\.5 GiB of 8\.0 GiB = about [\d,]+ tokens", facts[0])
    assert value(plan.arguments(), "--max-model-len") == "auto"
    assert warnings == []


def test_a_length_that_does_not_fit_says_what_does(tiny):
    said = problems(plan_of(tiny, kv_cache_gib=0.001, max_model_len=10_000), memory_gib=8)

    assert re.search(r"serve\.max_model_len=10,000: weights .* = about [\d,]{3,5} tokens; use at most that", said)


def test_weights_that_do_not_fit_say_what_would(tiny):
    said = problems(plan_of(tiny, environment=ON_GPU, kv_cache_gib=None), memory_gib=0.001)

    assert "its weights take" in said
    assert "serve.tensor_parallel_size=2" in said


def test_a_length_beyond_the_models_context_is_refused_and_one_near_it_is_warned_of(tiny):
    assert "takes at most 16,384 tokens" in problems(plan_of(tiny, max_model_len=16385))
    _, _, warnings = check(plan_of(tiny, max_model_len=16000), HardwareConfig())
    assert "more than 80%" in warnings[0]


def test_heads_that_do_not_divide_are_refused_with_degrees_that_do(tiny):
    assert "do not divide; 1, 2, 4 do" in problems(plan_of(tiny, tensor_parallel_size=3))


def test_a_port_in_use_and_an_open_address_without_a_key_are_told_together(tiny, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        said = problems(plan_of(tiny, port=holder.getsockname()[1], host="0.0.0.0"))

    assert "is in use" in said
    assert "VLLM_API_KEY" in said


def test_an_open_address_with_a_key_is_served(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "x")

    plan, _, _ = check(plan_of(tiny, host="0.0.0.0"), HardwareConfig())
    assert plan.url.startswith("http://127.0.0.1:")


def test_a_python_without_vllm_says_how_to_add_it(tmp_path):
    with pytest.raises(ConfigError, match=r"serve.python=nowhere: there is no such program"):
        find_environment("nowhere")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho null\n")
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match=r"vLLM is not installed there. (make|pip) .*serve"):
        find_environment(str(bare))


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("ValueError: ... the estimated maximum model length is 512. Try", "serve.max_model_len=512"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "too little memory"),
        ("OSError: [Errno 98] Address already in use", "choose another serve.port"),
        ("Bfloat16 is only supported on GPUs with compute capability of at least 8.0", "serve.dtype=fp16"),
        ("ValueError: base_model.x is unsupported LoRA weight", "serve.adapter=merged"),
        ("Model architectures ['FooForCausalLM'] are not supported for now", "'FooForCausalLM'"),
        ("something nobody has seen", ""),
    ],
)
def test_known_causes_of_death_say_what_to_change(log, advice):
    assert advice in explain(log, 1)
    assert bool(explain(log, 1)) == bool(advice)


def test_a_server_that_was_killed_is_taken_for_one_without_memory():
    assert "when memory runs out" in explain("", -9)


# --- together ------------------------------------------------------------------------------------------------------


def test_whole_models_are_not_served_together(tiny, tuned_run):
    with pytest.raises(ConfigError, match="is a whole model, and one server has one"):
        plan_of(of_run(tuned_run), tiny)


def test_words_that_llmkit_sets_itself_are_refused_among_the_extra_ones(tiny):
    said = problems(plan_of(tiny, extra_args=["--host", "0.0.0.0", "--api-key=secret"]))

    assert "--host is llmkit's to set: serve.host" in said
    assert "--api-key is llmkit's to set: VLLM_API_KEY in the environment" in said
    assert "secret" not in said


def test_more_gpus_than_there_are_is_refused_and_unused_ones_are_warned_of(tiny):
    two = {"environment": ON_GPU, "kv_cache_gib": None}
    assert "needs 4 GPUs, and there are 2" in problems(plan_of(tiny, devices="0,1", tensor_parallel_size=4, **two))
    _, _, warnings = check(plan_of(tiny, devices="0,1", **two), HardwareConfig(memory_gib=8))
    assert "2 GPUs, of which 1 are used" in warnings[0]


def test_weights_are_counted_once_where_a_folder_holds_them_twice(tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "twice"))
    once = read_model(ModelConfig(path=str(folder)), str(folder), None).weights
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))

    assert read_model(ModelConfig(path=str(folder)), str(folder), None).weights == once


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 8}}, None),
        ({"n_positions": 1024}, 1024),
    ],
)
def test_the_context_is_known_only_where_the_config_says_it_plainly(config, context):
    assert ModelFacts(config=config, weights=None).context == context
