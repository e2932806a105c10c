"""FlexAttention over prefix trees becomes kernels that fit into the GPUs of today, and is seldom compiled anew."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def compiler(wanted: str) -> list[list[str]]:
    """The words of each line that `flex_compiler.py` prints."""
    script = Path(__file__).with_name("flex_compiler.py")
    done = subprocess.run([sys.executable, script, wanted], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split(maxsplit=1) for line in done.stdout.splitlines()]


def test_rows_of_many_lengths_share_three_compiled_functions():
    ((_, frames),) = compiler("frames")
    assert int(frames) <= 3


@pytest.mark.skipif(find_spec("triton") is None, reason="this environment has no Triton, which brings ptxas")
@pytest.mark.parametrize(("capability", "shared_memory"), [("80", 163 * 1024), ("90", 227 * 1024)])
def test_forward_and_backward_compile_for(capability, shared_memory):
    """32 heads in 4 groups of 128 dimensions in bfloat16, for rows of any length; all queries, and a rank's part."""
    graphs = [(kind, json.loads(kernels)) for kind, kernels in compiler(capability)]
    assert [kind for kind, _ in graphs] == ["FORWARD", "BACKWARD"] * 2
    for kind, kernels in graphs:
        (attention,) = (size for name, size in kernels.items() if name.startswith("triton_tem_fused_flex_attention"))
        print(f"sm_{capability} {kind.lower()}: {attention / 1024:.0f} KB of shared memory in a block")
        assert all(size <= shared_memory for size in kernels.values()), kernels
        assert attention > 16 * 1024  # the tiles of queries, keys and values
