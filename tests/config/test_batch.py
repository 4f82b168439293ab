"""Batch arithmetic: what is not given follows from the rest, and what contradicts itself is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.config.resolve import DEFAULT_GLOBAL_BATCH_SIZE, resolve_batch
from llmkit.config.schema import TrainingConfig
from llmkit.errors import ConfigError

SIZES = st.none() | st.integers(1, 64)


def training(total=None, micro=None, steps=None) -> TrainingConfig:
    return TrainingConfig(global_batch_size=total, per_device_train_batch_size=micro, gradient_accumulation_steps=steps)


def sizes(config: TrainingConfig) -> tuple:
    return config.global_batch_size, config.per_device_train_batch_size, config.gradient_accumulation_steps


@given(SIZES, SIZES, SIZES, st.integers(1, 9))
def test_the_global_batch_is_always_the_product_or_the_sizes_are_refused(total, micro, steps, devices):
    config = training(total, micro, steps)
    try:
        resolve_batch(config, devices)
    except ConfigError:
        assert sizes(config) == (total, micro, steps), "a refused config stays as it was"
    else:
        all_of_it, one, times = sizes(config)
        assert all_of_it == one * times * devices
        assert min(all_of_it, one, times) >= 1


@given(SIZES, SIZES, SIZES, st.integers(1, 9))
def test_what_was_given_is_never_changed(total, micro, steps, devices):
    config = training(total, micro, steps)
    try:
        derived = resolve_batch(config, devices)
    except ConfigError:
        return
    for given_value, resolved in zip((total, micro, steps), sizes(config), strict=True):
        assert given_value in (None, resolved)
    assert len(derived) == [total, micro, steps].count(None) + 1  # and the batch of evaluation


@given(SIZES, SIZES, st.integers(1, 9))
def test_without_a_global_batch_size_nothing_is_refused(micro, steps, devices):
    resolve_batch(training(None, micro, steps), devices)


@pytest.mark.parametrize(
    ("given_sizes", "devices", "expected"),
    [
        ((None, None, None), 1, (DEFAULT_GLOBAL_BATCH_SIZE, 16, 1)),
        ((32, 4, None), 1, (32, 4, 8)),
        ((32, None, 8), 2, (32, 2, 8)),
        ((None, 4, 8), 2, (64, 4, 8)),
        ((None, None, None), 3, (15, 5, 1)),
        ((None, None, 5), 4, (20, 1, 5)),
    ],
    ids=str,
)
def test_sizes_follow_from_each_other(given_sizes, devices, expected):
    config = training(*given_sizes)
    resolve_batch(config, devices)

    assert sizes(config) == expected


def test_a_contradiction_names_the_keys_their_values_and_the_rule():
    with pytest.raises(ConfigError) as error:
        resolve_batch(training(10, 4, None), 2)

    message = str(error.value)
    assert "training.global_batch_size=10" in message
    assert "training.per_device_train_batch_size=4" in message
    assert "2 devices" in message
    assert "gradient_accumulation_steps=" not in message, "it was not given"
