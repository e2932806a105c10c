"""Engines against checkpoints, read back from their kernels."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_weights

from spell_megatron.config.schema import ParallelConfig
from spell_megatron.weights.convert import hf_to_megatron
from spell_megatron.weights.push import WeightPusher

pytestmark = pytest.mark.engine


@pytest.fixture
def run(capsys, monkeypatch):
    """run(engines, *arguments) -> (exit status, standard output, standard error)"""

    def call(engines, *arguments: object, key: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setenv("SPELL_API_KEY", key or (engines.api_key if engines else ""))
        capsys.readouterr()
        status = check_weights.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("kind", [pytest.param("tied", marks=pytest.mark.slow), "moe"])
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
    new[changed][17, 5] += 1e-3
    pusher.push(new.items(), "new")
    pusher.close()
    status, output, _ = run(engines, policy(kind, 1), *engines.urls)
    assert status == 1
    assert f"{count - 1} of {count} tensors agree\n  {changed}: checkpoint float32[64x64]:" in output
    assert output.count("model.") == 1


def test_other_checkpoints_and_no_engine(engines_for, policy, run, tmp_path):
    engines = engines_for("moe")
    weights = load_file(policy("moe", 0) / "model.safetensors")
    pusher = WeightPusher(engines)
    pusher.push(weights.items(), "old")
    pusher.close()
    hf_to_megatron(policy("moe", 0), tmp_path / "megatron", ParallelConfig(tensor=2, expert=2))
    status, output, _ = run(engines, tmp_path / "megatron", *engines.urls)
    assert (status, output) == (0, f"{engines.urls[0]}: {len(weights)} of {len(weights)} tensors agree\n")

    status, output, _ = run(engines, policy("dense"), *engines.urls)
    both = weights.keys() | load_file(policy("dense") / "model.safetensors").keys()
    assert status == 1 and f" of {len(both)} tensors agree\n  model.embed_tokens.weight: checkpoint" in output

    status, _, errors = run(engines, policy("moe"), *engines.urls, "http://127.0.0.1:9")
    assert status == 2 and "Nothing answers at http://127.0.0.1:9." in errors
    status, _, errors = run(engines, policy("moe"), *engines.urls, key="another")
    assert status == 2 and "refuses the API key. Set SPELL_API_KEY" in errors and "401" not in errors
    status, _, errors = run(engines, tmp_path, *engines.urls)
    assert status == 2 and f"{tmp_path} is no" in errors


@pytest.mark.slow
@pytest.mark.parametrize(("tensor_parallel", "dtype"), [(1, torch.float16), (2, torch.float32)])
def test_a_started_engine_gets_the_weights(tensor_parallel, dtype, policy, run, tmp_path):
    """Also those in float16, a type that engines are not started with; they compute in float32 then."""
    folder = shutil.copytree(policy("tied"), tmp_path / "policy")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    status, output, _ = run(None, folder, "--start", "--device", "cpu", "--tensor-parallel", tensor_parallel)
    count = len(weights)
    assert status == 0
    assert output.startswith(f"pushed {count} tensors") and f"{count} of {count} tensors agree" in output


@pytest.mark.slow
def test_a_started_engine_gets_a_hybrid(policy, run, tmp_path):
    """As Qwen3.5 is published: beside a vision tower, in bfloat16 with some tensors of linear layers in float32."""
    folder = shutil.copytree(policy("vision"), tmp_path / "policy")
    wide = ("A_log", "linear_attn.norm.weight")
    weights = {
        name: tensor if name.endswith(wide) else tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    status, output, errors = run(None, folder, "--start", "--device", "cpu")
    count = sum(not name.startswith("model.visual.") for name in weights)
    assert (status, errors) == (0, "")
    assert output.startswith(f"pushed {count} tensors") and f"{count} of {count} tensors agree" in output
