"""fp16's loss scaler overflows while it looks for its scale; only overflow after overflow is a divergence."""

from types import SimpleNamespace

import pytest
import torch

from llmkit.errors import NonFiniteError
from llmkit.training.trainer import FP16_OVERFLOWS_IN_A_ROW, RunMixin


class GradientNorms:
    """Stands in for the trainer underneath: hands out the gradient norms it is given."""

    def __init__(self, norms):
        self.norms = iter(norms)
        self.state = SimpleNamespace(global_step=0)

    def _get_grad_norm(self, model, grad_norm=None):
        return torch.tensor(next(self.norms))


class Scaled(RunMixin, GradientNorms):
    accelerator = SimpleNamespace(scaler=object())
    args = SimpleNamespace(device=torch.device("cpu"))
    processing_class = SimpleNamespace(batch_decode=lambda ids: ["text"] * len(ids))


def run(norms, tmp_path):
    trainer = Scaled(norms, run_dir=tmp_path)
    for _ in norms:
        batch = {"input_ids": torch.ones(1, 2, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)}
        trainer._batches_of_step = [(batch, torch.tensor(1.0))]
        trainer._get_grad_norm(None)


def test_overflows_broken_by_a_finite_step_are_part_of_fp16(tmp_path):
    almost = [float("inf")] * (FP16_OVERFLOWS_IN_A_ROW - 1)

    run([*almost, 1.0, *almost, 1.0], tmp_path)


def test_ten_overflows_in_a_row_end_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="gradient is not a finite number"):
        run([float("inf")] * FP16_OVERFLOWS_IN_A_ROW, tmp_path)

    assert (tmp_path / "nonfinite_batch.json").exists()
