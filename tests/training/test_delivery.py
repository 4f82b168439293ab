"""What `final/` holds for those who load it: template, card and the command that serves it."""

import re
from pathlib import Path

import pytest

from llmkit.config.schema import (
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    TrainingConfig,
)


def config(**settings):
    lora = settings.pop("lora", None)
    return TrainConfig(
        **{"model": ModelConfig(name="custom", hub_id="org/base"), "data": DataConfig(path="chats.jsonl")}
        | {"method": MethodConfig(name="lora" if lora else "full"), "training": TrainingConfig(learning_rate=1e-4)}
        | settings,
        lora=lora,
    )


def adapter(directory: Path, **settings) -> Path:
    import json

    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 8, "bias": "none"} | settings))
    return directory


def test_a_full_model_is_served_by_its_directory(tmp_path):
    from llmkit.training.delivery import serve_command

    assert serve_command(config(), tmp_path) == f"python -m vllm.entrypoints.openai.api_server --model {tmp_path}"


def test_an_adapter_is_served_with_its_base_template_and_end_tokens(tmp_path):
    from llmkit.training.delivery import serve_command

    final = adapter(tmp_path / "alpha" / "final")
    command = serve_command(config(lora=LoraConfig(r=8)), final)
    assert f"--model org/base --enable-lora --lora-modules alpha={final} --max-lora-rank 16 " in command
    assert f"--chat-template {final}/chat_template.jinja --generation-config {final}" in command


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [
        ({"trainable_token_indices": {"model.embed_tokens": [640]}}, "rows of new tokens"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(lm_head\)"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"bias": "all"}, r"trained biases \(bias=all\)"),
    ],
)
def test_an_adapter_that_vllm_would_refuse_is_to_be_merged_first(tmp_path, settings, obstacle):
    from llmkit.training.delivery import serve_command

    said = serve_command(config(lora=LoraConfig()), adapter(tmp_path / "final", **settings))
    assert re.search(rf"does not serve an adapter with {obstacle}: merge it first, .*README\.md", said)
    assert "vllm.entrypoints" not in said


def test_vllm_has_no_place_for_rows_of_new_tokens():
    utils = pytest.importorskip("vllm.lora.utils")
    with pytest.raises(ValueError, match="unsupported LoRA weight"):
        utils.parse_fine_tuned_lora_name("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta")


def test_the_card_names_all_sources_where_it_started_and_the_values_of_the_template():
    from llmkit.training.delivery import model_card

    sources = [SourceConfig(path="a.jsonl"), SourceConfig(hub_id="org/rows")]
    data = DataConfig(datasets=sources, chat_template_kwargs={"enable_thinking": False})
    card = model_card(config(data=data, init_from="runs/sft"), {"eval_loss": 0.5})
    for line in ("- data: `a.jsonl`, `org/rows`", "- started from: `runs/sft`", "- eval loss: 0.5"):
        assert line in card.splitlines()
    assert '{"enable_thinking": false}' in card
    assert "new tokens" not in card
