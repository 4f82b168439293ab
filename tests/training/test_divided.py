"""What a checkpoint holds of a model that FSDP2 has divided: on two ranks of gloo, where the trainer cannot be had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_divided_model_goes_on_from_what_was_saved_as_if_nothing_had_been(tmp_path, method):
    script = CHECKOUT / "tests/training/divided_ranks.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    done = subprocess.run(
        [*launcher, script, tmp_path, method], env=environment, capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        losses = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        assert losses["again"] == losses["first"]
