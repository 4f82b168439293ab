"""A model that visits its modules only where something changes is in the states that it would be in otherwise."""

import torch
from torch import nn

from llmkit.training.walks import shorten_walks


def a_model():
    """Trained in its second layer; below the top in evaluation mode, as an adapter's wrapper has a loaded base."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model.eval()
    model.training = True
    model[0].requires_grad_(False)
    return model


def test_training_mode_reaches_every_module_whenever_it_changes():
    model = a_model()

    shorten_walks(model)

    for change, expected in [(model.train, True), (model.eval, False), (model.train, True), (model.train, True)]:
        change()
        assert {module.training for module in model.modules()} == {expected}
    assert model.train() is model


def test_what_is_trained_is_returned_and_forgets_its_gradients():
    model = a_model()
    trained = shorten_walks(model)
    assert [id(one) for one in trained] == [id(one) for one in model[1].parameters()]

    for set_to_none, left in [(False, 0.0), (True, None)]:
        model(torch.ones(1, 2)).sum().backward()
        assert any(one.grad.abs().sum() > 0 for one in trained)
        model.zero_grad(set_to_none=set_to_none)
        assert [one.grad if one.grad is None else float(one.grad.abs().sum()) for one in trained] == [left, left]
