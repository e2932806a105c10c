"""vLLM's layers of float8 take pushes again and again, on GPUs as on paper."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("kind", "received"), [("moe", 25), ("vision_moe", 36)])
def test_a_push_fills_layers_of_float8_as_a_fresh_start_does(kind, received, with_vllm, policy):
    """Every weight and scale, in the memory that CUDA graphs know; nothing of the stream stays unused."""
    script = Path(__file__).with_name("quantised_reload.py")
    done = subprocess.run(
        [sys.executable, script, policy(kind), policy(kind, 1)],
        env=with_vllm | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))
    assert found.pop("changed") > 15  # the two checkpoints are different ones
    assert found == {
        "types": ["torch.bfloat16", "torch.float32", "torch.float8_e4m3fn"],
        "received": received,
        "missing": [],
        "unused": [],
        "moved": [],
        "gone": [],
        "differ": [],
        "kernels": ["CutlassFP8ScaledMMLinearKernel", "TritonExperts"],
        "stale_scales": [],
        "batch_invariant": True,
    }
