"""In an update no tensor that was left on the CPU meets one on the GPU. The GPU is pretended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_cases import make_policy


@pytest.mark.parametrize(("policy", "mistake"), [("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", False)])
def test_an_update_of_experts_stays_on_its_device(policy, mistake, tmp_path):
    make_policy(policy, tmp_path)
    script = Path(__file__).with_name("update_worker.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), *["mistake"] * mistake],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (script.parents[2], script.parents[1])))},
        timeout=600,
    )
    if mistake:
        assert "takes tensors of a GPU and of a CPU" in done.stderr
    else:
        assert done.returncode == 0 and "METRICS" in done.stdout, done.stderr[-3000:]
