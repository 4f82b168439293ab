"""`launcher.verify=N`: a joint pass is compared with the run's own, by what one more padded column does to that."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmkit.training.pack.verification import PackDiffers, Verification


class Trainer:
    """One whose joint passes may be off by some part of what they should be."""

    def __init__(self, off=0.0, dropout=0.0):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(9, 8), nn.Dropout(dropout), nn.Linear(8, 9))
        self.args = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)
        self.off, self.is_alone, self.passes = off, False, 0
        self.trained = list(self.model.parameters())

    @contextmanager
    def alone(self):
        self.is_alone = True
        yield
        self.is_alone = False

    def training_step(self, model, inputs):
        self.passes += 1
        logits = model(inputs["input_ids"]).transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, inputs["labels"])
        (loss if self.is_alone else loss * (1 + self.off)).backward()
        return loss.detach()


BATCH = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    "labels": torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]]),
}


def gradients(trainer):
    return [parameter.grad.clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_steps_are_what_they_were_and_equality_is_told_once(dropout):
    trainer, plain, told = Trainer(dropout=dropout), Trainer(dropout=dropout), []
    Verification(trainer, 2, trainer.alone, told.append)

    torch.manual_seed(1)
    losses = [trainer.training_step(trainer.model, BATCH) for _ in range(3)]
    torch.manual_seed(1)
    expected = [plain.training_step(plain.model, BATCH) for _ in range(3)]

    assert losses == expected
    assert all(map(torch.equal, gradients(trainer), gradients(plain)))  # of three passes, added up
    assert trainer.passes == 3  # those alone have left no trace
    assert all(one is other for one, other in zip(trainer.trained, trainer.model.parameters(), strict=True))
    (line,) = told
    assert line.startswith("gradients equal to the last bit to those alone")


def test_a_joint_pass_that_is_another_one_stops_the_run_at_once():
    trainer = Trainer(off=1e-3)
    Verification(trainer, 2, trainer.alone, pytest.fail)

    with pytest.raises(PackDiffers, match=r"1\.0e-03 of its length.*launcher=local"):
        trainer.training_step(trainer.model, BATCH)


def test_rounding_is_told_and_no_reason_to_stop():
    trainer, told = Trainer(off=2e-7), []
    Verification(trainer, 1, trainer.alone, told.append)

    trainer.training_step(trainer.model, BATCH)

    assert "of their length away from those alone" in told[0]
