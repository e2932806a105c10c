"""A push to engines on the trainer's own GPUs that fails keeps no rank waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import torchrun

WORKER = Path(__file__).with_name("failing_push_worker.py")


@pytest.mark.parametrize(
    ("what", "which", "reason"),
    [
        ("/update_weights", 2, "no /update_weights"),
        ("/pause", 1, "no /pause"),
        ("/finish_weight_update", 1, "no /finish_weight_update"),
        ("memory", 0, "rank 0: CUDA out of memory"),
        ("memory", 1, "rank 1: CUDA out of memory"),
    ],
)
def test_all_ranks_come_to_the_restart(what, which, reason):
    output = torchrun(2, WORKER, what, which, timeout=120)
    assert f"RESULT 0 failed: The engines did not take the weights ({reason}" in output
    assert "RESULT 1 went along; then restart" in output
