"""The config that the words of a `train` command compose to, for scripts, which have no fixtures."""

from llmkit.config import TrainConfig, resolve, validate


def config_of(*words: str) -> TrainConfig:
    """Resolved and validated, as the train verb has it."""
    from hydra import compose, initialize_config_module

    from llmkit.config.arguments import parse_arguments
    from llmkit.config.registration import register

    register()
    with initialize_config_module("llmkit.conf", version_base="1.3"):
        config = resolve(compose("train", overrides=parse_arguments(list(words)).overrides))
    validate(config)
    return config
