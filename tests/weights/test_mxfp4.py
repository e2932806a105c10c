"""Checkpoints whose experts are stored in MXFP4, as gpt-oss is published."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import load, make
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from spell_megatron.cli import main
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.model import check_weights
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.mxfp4 import unpacked


def pack(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Put random packed experts in the place of plain ones, scales in a file of their own; returns plain ones as
    transformers makes them."""
    generator, plain = torch.Generator().manual_seed(seed), {}
    tensors, scales = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        exponents = torch.randint(110, 130, shape, dtype=torch.uint8, generator=generator)
        plain[name] = _convert_moe_packed_tensors(blocks, exponents)
        tensors[f"{name}_blocks"], scales[f"{name}_scales"] = blocks, exponents
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": scales}
    for file, content in files.items():
        save_file(content, folder / file)
    (folder / "model.safetensors").unlink()
    places = {name: file for file, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return plain


@pytest.fixture
def packed(tmp_path):
    """(folder of a packed checkpoint, its experts as plain tensors)."""
    folder = tmp_path / "packed"
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    make("gpt_oss", sizes).bfloat16().save_pretrained(folder)
    return folder, pack(folder)


def test_every_number_is_exact():
    """All 256 bytes with small and large exponents, against transformers."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    scales = torch.tensor([0, 1, 60, 126, 127, 128, 129, 200] * 2, dtype=torch.uint8).view(1, 4, 4)
    assert torch.equal(unpacked(blocks[0], scales[0]), _convert_moe_packed_tensors(blocks, scales)[0])


def test_conversion_makes_a_plain_checkpoint(packed, tmp_path, capsys):
    """There and back, compared tensor by tensor; config.json calls nothing quantised any more."""
    folder, plain = packed
    out, back = tmp_path / "megatron", tmp_path / "plain"
    assert main(["convert", "hf-to-megatron", "--hf", str(folder), "--megatron", str(out), "--verify"]) == 0
    assert main(["convert", "megatron-to-hf", "--megatron", str(out), "--hf", str(back), "--verify"]) == 0
    assert "are the same in both" in capsys.readouterr().out
    made, rest = load_file(back / "model.safetensors"), load_file(folder / "model-00001-of-00002.safetensors")
    expected = plain | {name: tensor for name, tensor in rest.items() if not name.endswith("_blocks")}
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


def test_what_is_loaded_is_what_conversion_makes(packed, process_group):
    folder, plain = packed
    model = load(folder, "bfloat16")
    expert = model.decoder.layers[1].mlp.experts.local_experts[5]
    assert torch.equal(expert.linear_fc2.weight, plain["model.layers.1.mlp.experts.down_proj"][5].T)
    gate_up = plain["model.layers.1.mlp.experts.gate_up_proj"][5]
    assert torch.equal(expert.linear_fc1.weight, torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1).T)


def test_training_asks_for_plain_weights(packed):
    found = Findings()
    check_weights(found, packed[0], PolicyModel.load(packed[0]))
    (fault,) = found.faults
    assert "quantised (mxfp4)" in str(fault) and "spell convert hf-to-megatron" in str(fault)
