"""The suite for GPUs: that its script works, on a CPU; and all of it where there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize(
    "parts",
    [
        ("attention", "logprobs", "experts", "parity", "update"),
        pytest.param(("transfer",), marks=[pytest.mark.slow, pytest.mark.engine]),
    ],
)
def test_it_runs_with_tiny_sizes(parts):
    done = run("--tiny", "--only", *parts)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["holds"], result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_is_skipped():
    done = run("--only", "parity")
    assert done.returncode == 3 and "torch sees no GPU" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_all_goals_hold():
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["holds"], done.stdout
