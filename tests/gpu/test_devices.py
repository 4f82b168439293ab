"""The GPUs of a run, as `llmkit jobs` shows them. Needs an NVIDIA GPU and nvidia-ml-py."""

import os
import re
import subprocess
import sys

import pytest

from llmkit.launchers.devices import devices_of

pytestmark = pytest.mark.gpu

HOLDS_TWO_GIB = """
import sys, torch
kept = torch.zeros(2**29, device="cuda")
torch.cuda.synchronize()
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_gpu_of_a_process_that_this_one_has_started_is_found_with_its_memory():
    pytest.importorskip("pynvml")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_TWO_GIB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        shown = devices_of(os.getpid())
        child.communicate()

    assert shown is not None
    used, total = map(int, re.fullmatch(r"GPU \d+: \d+%, (\d+) of (\d+) GiB", shown).groups())
    assert 2 <= used < total
