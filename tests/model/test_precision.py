"""Which precision a device gets, and what is said of one that it lacks."""

import pytest

from llmkit.config.schema import HardwareConfig
from llmkit.errors import ConfigError


@pytest.fixture
def device_with(monkeypatch):
    """A function: a GPU that does or does not compute bfloat16."""
    import torch

    def make(*, bf16):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        return torch.device("cuda", 0)

    return make


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16_pure"])
def test_a_cpu_has_the_precision_asked_for(name):
    import torch

    from llmkit.model.precision import resolve_precision

    assert resolve_precision(name, torch.device("cpu")).name == name


def test_auto_is_the_best_of_the_device(device_with):
    import torch

    from llmkit.model.precision import resolve_precision

    assert resolve_precision("auto", torch.device("cpu")).name == "fp32"
    assert resolve_precision("auto", device_with(bf16=True)).name == "bf16"
    assert resolve_precision("auto", device_with(bf16=False)).name == "fp16"


def test_a_precision_that_the_device_lacks_names_those_it_has(device_with):
    import torch

    from llmkit.model.precision import resolve_precision

    with pytest.raises(ConfigError, match="precision=fp16: this cpu device has bf16, fp32, bf16_pure, or use auto"):
        resolve_precision("fp16", torch.device("cpu"))
    with pytest.raises(ConfigError, match="precision=bf16: this cuda device has fp16, fp32, or use auto"):
        resolve_precision("bf16", device_with(bf16=False))


def test_trained_weights_are_float32_unless_all_is_pure_bfloat16():
    import torch

    from llmkit.model.precision import KINDS

    assert {name for name, kind in KINDS.items() if kind.trained != torch.float32} == {"bf16_pure"}
    assert all(kind.autocast in (None, kind.frozen) for kind in KINDS.values())


def test_the_device_is_the_one_asked_for(monkeypatch):
    import torch

    from llmkit.model.precision import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(HardwareConfig(device="auto")).type == "cuda"
    assert resolve_device(HardwareConfig(device="cpu")).type == "cpu"


def test_without_a_gpu_auto_is_the_cpu_and_a_gpu_is_refused(monkeypatch):
    import torch

    from llmkit.model.precision import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(HardwareConfig(device="auto")).type == "cpu"
    with pytest.raises(ConfigError, match=r"hardware=h100 needs a GPU.*hardware=cpu or hardware=auto.*llmkit doctor"):
        resolve_device(HardwareConfig(name="h100", device="cuda"))
