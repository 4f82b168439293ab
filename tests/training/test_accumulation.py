"""Gradient accumulation only saves memory: N micro-batches of one row train like one micro-batch of N rows."""

import pytest
from recipe_trainers import make_trainer, random_pairs, random_rows, trained_weights
from transformers import TrainerCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs

# 20 rows are two steps of 8 and one of 4. Between 1 and 120 tokens are learnt: a mean of means would be far off.
LEARNT = [1, 120, 3, 60, 2, 90, 7, 1, 100, 5, 33, 2, 80, 1, 64, 4, 110, 2, 9, 50]


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_times_n_and_n_times_one_give_the_same_losses_gradients_and_weights(compose, tmp_path, recipe, method):
    if recipe == "sft":
        rows = random_rows([count + 10 for count in LEARNT], learnt=LEARNT)
    else:
        rows = random_pairs([(10, count, 121 - count) for count in LEARNT])
    found = []
    for micro_batch, accumulation in ((1, 8), (8, 1), (2, 4)):
        config = compose(
            *(f"recipe={recipe}", "model=tiny", "data=demo", f"method={method}", "hardware=cpu", "precision=fp32"),
            *("training.max_steps=3", "training.logging_steps=1", "training.warmup_steps=0"),
            f"training.per_device_train_batch_size={micro_batch}",
            f"training.gradient_accumulation_steps={accumulation}",
        )
        trainer = make_trainer(config, tmp_path / "run", rows)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        found.append((losses, gradients.steps, trained_weights(trainer)))

    losses, steps, weights = found[0]
    assert len(losses) == len(steps) == 3
    for other_losses, other_steps, other_weights in found[1:]:
        # DPO's loss is made of differences of sums of log-probabilities, which lose a digit.
        assert other_losses == pytest.approx(losses, rel=1e-6 if recipe == "sft" else 1e-5)
        assert distance(steps[0], other_steps[0]) < 3e-6
        # From the second step on the weights differ in their last digits, by AdamW's division, and so do gradients.
        assert all(distance(one, other) < 1e-4 for one, other in zip(steps, other_steps, strict=True))
        assert distance(weights, other_weights) < 1e-4


def distance(one, other):
    """The norm of the difference of all tensors, relative to theirs."""
    norm = sum(tensor.square().sum() for tensor in one.values()).sqrt()
    return float(sum((other[name] - tensor).square().sum() for name, tensor in one.items()).sqrt() / norm)
