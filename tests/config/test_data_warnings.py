"""Settings of the data without effect are said to be so."""

import pytest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.path=demo", "data.hub_id=org/name"], "data.hub_id=org/name has no effect: data.path=demo is read"),
        (["data.path=demo", "data.revision=v1"], "data.revision=v1 has no effect"),
        (["data.path=demo", "data.weight=2"], "data.weight=2.0 has no effect"),
        (["data.hub_id=org/name", "data.weight=2"], "data.weight=2.0 has no effect: it is the only source"),
        (["data.datasets=[{path: demo}]", "data.limit=5"], "data.limit=5 has no effect: data.datasets has its own"),
    ],
)
def test_a_setting_without_effect_is_named(compose, words, said):
    from llmkit.config import warnings

    assert [one for one in warnings(compose(*words)) if one.startswith(said)]


@pytest.mark.parametrize(
    "words", [["data.path=demo"], ["data=gsm8k", "data.path=demo"], ["data.datasets=[{path: demo}]"]]
)
def test_settings_with_an_effect_are_not(compose, words):
    from llmkit.config import warnings

    assert not [one for one in warnings(compose(*words, "model=phi2")) if "data." in one]


def test_a_pair_is_not_split(compose):
    from llmkit.errors import ConfigError

    with pytest.raises(ConfigError, match="a pair cannot be split; truncate_prompt"):
        compose("recipe=dpo", "data.on_overlong=split")
