"""What `final/` holds for those who load it: template and card."""

from llmkit.config.schema import (
    DataConfig,
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


def test_the_card_names_all_sources_where_it_started_and_the_values_of_the_template():
    from llmkit.training.delivery import model_card

    sources = [SourceConfig(path="a.jsonl"), SourceConfig(hub_id="org/rows")]
    data = DataConfig(datasets=sources, chat_template_kwargs={"enable_thinking": False})
    card = model_card(config(data=data, init_from="runs/sft"), {"eval_loss": 0.5})
    for line in ("- data: `a.jsonl`, `org/rows`", "- started from: `runs/sft`", "- eval loss: 0.5"):
        assert line in card.splitlines()
    assert '{"enable_thinking": false}' in card
    assert "new tokens" not in card
