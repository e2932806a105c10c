"""Engines against checkpoints, read back from their kernels."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_weights  # noqa: E402

from spell_megatron.config import ParallelConfig  # noqa: E402
from spell_megatron.weights.convert import hf_to_megatron  # noqa: E402
from spell_megatron.weights.push import WeightPusher  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.fixture
def run(capsys, monkeypatch):
    """run(engines, *arguments) -> (exit status, standard output, standard error)"""

    def call(engines, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("SPELL_API_KEY", engines.api_key if engines else "")
        capsys.readouterr()
        status = check_weights.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("kind", ["dense", "tied", "moe"])
def test_weights_from_disk_and_pushed_ones(kind, engines_for, policy, run):
    """An engine agrees with what it loaded, then with what was pushed, and with nothing else."""
    engines = engines_for(kind)
    old, new = (load_file(policy(kind, seed) / "model.safetensors") for seed in (0, 1))
    pusher = WeightPusher(engines, bucket_bytes=1 << 14)
    pusher.push(old.items(), "old")
    count = len(old)
    same = f"{engines.urls[0]}: {count} of {count} tensors agree\n"
    assert run(engines, policy(kind, 0), *engines.urls) == (0, same, "")

    changed = "model.layers.1.self_attn.k_proj.weight"
    new[changed][17, 5] += 1e-6
    pusher.push(new.items(), "new")
    pusher.close()
    status, output, _ = run(engines, policy(kind, 1), *engines.urls)
    assert status == 1
    assert f"{count - 1} of {count} tensors agree\n  {changed}: checkpoint float32[64x64]:" in output
