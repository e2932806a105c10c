"""What a push changes in vLLM's model, without an engine around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_everything_of_gpt_oss_arrives(policy):
    """Loaded from disk, where a layer's experts are stored together, and pushed one by one: every tensor, bit by bit,
    and the sinks that the attention itself has."""
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    script = Path(__file__).with_name("reload_worker.py")
    paths = os.pathsep.join(map(str, (script.parents[2], script.parents[1])))
    done = subprocess.run(
        [sys.executable, script, policy("gpt_oss"), policy("gpt_oss", 1)],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    nothing = {name: [] for name in ("loaded", "unused", "missing", "pushed", "attention")}
    assert json.loads(line.removeprefix("FOUND ")) == nothing
