"""What follows from the rest of a config is filled in, and recorded as filled in."""

import pytest


def test_lora_alpha_is_twice_the_rank_when_unset(compose):
    config = compose("lora.r=12")

    assert config.lora.lora_alpha == 24
    assert "lora.lora_alpha" in config.derived


def test_a_given_lora_alpha_stays(compose):
    config = compose("lora.r=12", "lora.lora_alpha=7")

    assert config.lora.lora_alpha == 7
    assert "lora.lora_alpha" not in config.derived


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_lora_alpha_follows_the_rank_in_every_job_of_a_sweep(compose, method):
    jobs = compose(f"method={method}", "-m", "lora.r=4,8")

    assert [(job.lora.r, job.lora.lora_alpha) for job in jobs] == [(4, 8), (8, 16)]
    assert all("lora.lora_alpha" in job.derived for job in jobs)


@pytest.mark.parametrize(("method", "rate"), [("full", 2e-5), ("freeze", 2e-5), ("lora", 2e-4), ("qlora", 2e-4)])
def test_the_learning_rate_follows_the_method_when_unset(compose, method, rate):
    config = compose("model=phi2", f"method={method}")

    assert config.training.learning_rate == rate
    assert "training.learning_rate" in config.derived


def test_a_given_learning_rate_stays(compose):
    config = compose("model=phi2", "training.learning_rate=1e-3")

    assert config.training.learning_rate == 1e-3
    assert "training.learning_rate" not in config.derived


def test_the_rate_and_steps_of_the_demo_model_go_when_another_model_is_chosen(compose):
    assert compose().training.max_steps == 300
    assert compose("model=phi2").training.max_steps is None


def test_what_only_the_training_machine_knows_stays_open(compose):
    config = compose()

    assert (config.precision.name, config.hardware.device, config.data.max_length) == ("auto", "auto", None)
