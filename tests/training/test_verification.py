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
        self.off, self.is_alone, self.passes, self.joint_passes = off, False, 0, 0
        self.trained = list(self.model.parameters())

    @contextmanager
    def alone(self):
        self.is_alone = True
        yield
        self.is_alone = False

    def training_step(self, model, inputs):
        self.passes += 1
        self.joint_passes += not self.is_alone
        logits = model(inputs["input_ids"]).transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, inputs["labels"])
        (loss if self.is_alone else loss * (1 + self.off)).backward()
        return loss.detach()


BATCH = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    "labels": torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]]),
}


def verify(trainer, count, tell):
    Verification(trainer, count, alone=trainer.alone, joint_passes=lambda: trainer.joint_passes, tell=tell)


def gradients(trainer):
    return [parameter.grad.clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_steps_are_what_they_were_and_equality_is_told_once(dropout):
    trainer, plain, told = Trainer(dropout=dropout), Trainer(dropout=dropout), []
    verify(trainer, 2, told.append)

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


@pytest.mark.parametrize(("off", "told"), [(1e-3, "1.0e-03"), (2e-5, "2.0e-05")])
def test_a_joint_pass_that_is_another_one_stops_the_run_at_once(off, told):
    trainer = Trainer(off=off)
    verify(trainer, 2, pytest.fail)

    with pytest.raises(PackDiffers, match=rf"{told} of its length.*launcher=local"):
        trainer.training_step(trainer.model, BATCH)


@pytest.mark.parametrize("off", [2e-7, 2e-6])  # an Intel CPU's joint pass was 1.2e-6 away, one more column moved no bit
def test_rounding_is_told_and_no_reason_to_stop(off):
    trainer, told = Trainer(off=off), []
    verify(trainer, 1, told.append)

    trainer.training_step(trainer.model, BATCH)

    assert "of their length away from those alone" in told[0]


def test_it_is_told_how_many_of_the_passes_were_joint():
    trainer, told, counts = Trainer(), [], iter([0, 0, 0, 1])
    Verification(trainer, 2, alone=trainer.alone, joint_passes=lambda: next(counts), tell=told.append)

    for _ in range(2):
        trainer.training_step(trainer.model, BATCH)

    assert told[0].startswith("gradients of 1 in 2 micro-batches equal to the last bit")


def test_a_pass_that_was_not_joint_proves_nothing():
    trainer, told = Trainer(off=1e-3), []
    Verification(trainer, 1, alone=trainer.alone, joint_passes=lambda: 0, tell=told.append)

    trainer.training_step(trainer.model, BATCH)

    assert told == ["nothing compared, it went through the base by itself"]
