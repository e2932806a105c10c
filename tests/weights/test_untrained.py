"""Models that also see images: the language model is trained, and all else goes from checkpoint to checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from hf_models import COMMON, MOE, apart, edit, load, make
from safetensors.torch import load_file
from trainer_cases import make_config, make_rows, make_trainer, save, weights

from spell_megatron.checkpoint.restore import load as restore
from spell_megatron.cli import main
from spell_megatron.errors import UserError
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.check import read_checkpoint
from spell_megatron.weights.convert import compare
from spell_megatron.weights.huggingface import save_checkpoint
from spell_megatron.weights.reshard import export

in_a_group = pytest.mark.usefixtures("process_group")

KINDS = ("qwen3_5_text", "qwen3_5_moe_text")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(family) -> (transformers' model in float32, its folder with layers that predict further tokens)."""
    made = {}

    def get(family: str) -> tuple[torch.nn.Module, Path]:
        if family not in made:
            hf = make(family, {"vision": True} | (MOE if "moe" in family else {}))
            folder = tmp_path_factory.mktemp(family)
            hf.save_pretrained(folder)
            mtp = {"mtp.fc.weight": torch.randn(4, 8).bfloat16(), "mtp.norm.weight": torch.randn(4)}
            mtp["mtp.layers.0.mlp.experts.gate_up_proj"] = torch.randn(2, 4, 3).to(torch.float8_e4m3fn)
            edit(lambda tensors: tensors.update(mtp))(folder)
            (folder / "preprocessor_config.json").write_text('{"of": "images"}')
            made[family] = hf, folder
        return made[family]

    return get


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the index of a checkpoint lists, or that its only file holds."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    files = json.loads(index.read_text())["weight_map"]
    assert not (folder / "model.safetensors").exists()  # transformers would read no other file
    return {name: load_file(folder / file)[name] for name, file in files.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8))
        for name, tensor in one.items()
    )


# First: conversion has no process groups.
@pytest.mark.parametrize("family", KINDS)
def test_conversion_carries_all_through(family, whole, tmp_path, capsys):
    """As published: bfloat16 with some tensors of the linear layers in float32, and experts in one tensor."""
    _, folder = whole(family)
    source, out, back = shutil.copytree(folder, tmp_path / "source"), tmp_path / "megatron", tmp_path / "back"

    def publish(held):
        narrow = [
            name for name in held if not name.startswith("mtp.") and not name.endswith(("A_log", "attn.norm.weight"))
        ]
        held |= {name: held[name].bfloat16() for name in narrow}
        if family == "qwen3_5_moe_text":
            own = "model.language_model.layers.1.mlp.experts."
            parts = [[held.pop(f"{own}{e}.{p}_proj.weight") for p in ("gate", "up", "down")] for e in range(6)]
            held[own + "gate_up_proj"] = torch.stack([torch.cat(p[:2]) for p in parts])
            held[own + "down_proj"] = torch.stack([p[2] for p in parts])

    edit(publish)(source)
    text = (source / "config.json").read_text().replace("float32", "bfloat16")
    (source / "config.json").write_text(text)
    assert (
        main(["convert", "hf-to-megatron", "--hf", str(source), "--megatron", str(out), "--tp", "2", "--verify"]) == 0
    )
    printed = capsys.readouterr().out
    assert "tensors of model.visual and mtp (0.00 GB) are not trained and were copied as they are" in printed
    assert main(["convert", "megatron-to-hf", "--hf", str(back), "--megatron", str(out), "--verify"]) == 0
    assert "are not trained" in capsys.readouterr().out
    expected = {name: t for name, t in tensors(source).items() if name.startswith(("mtp.", "model.visual."))}
    expected |= apart({name: t for name, t in tensors(source).items() if name not in expected})
    assert same(tensors(back), expected)
    assert (back / "config.json").read_text() == text
    damaged = out / "untrained.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match="differs between"):
        compare(out, source)
    damaged.unlink()
    capsys.readouterr()
    assert main(["convert", "megatron-to-hf", "--hf", str(tmp_path / "lost"), "--megatron", str(out)]) == 2
    assert f"belongs in {damaged}, but it is not there. Copy the whole checkpoint." in capsys.readouterr().err
    assert not (tmp_path / "lost").exists()


@in_a_group
@pytest.mark.parametrize("family", KINDS)
def test_the_language_model_computes_what_transformers_does(family, whole):
    hf, folder = whole(family)
    tokens = torch.randint(0, COMMON["vocab_size"], (40,), generator=torch.Generator().manual_seed(1))
    model = load(folder)
    with torch.no_grad():
        hidden = model(tokens[None], torch.arange(40)[None], torch.full((40,), 40))
        ours = model.output_layer(hidden, weight=model.output_weight)[0][:, 0]
        assert (ours - hf(input_ids=tokens[None]).logits[0]).abs().max() <= 1e-4


@in_a_group
@pytest.mark.parametrize("family", KINDS)
def test_what_is_written_is_the_whole_model(family, whole, tmp_path):
    """Every tensor that was not trained has the bits that it had, and transformers loads all of them."""
    hf, folder = whole(family)
    model = load(folder)
    with torch.no_grad():
        model.decoder.final_layernorm.weight.add_(1)
    save_checkpoint(export(model), folder, tmp_path / "out", shard_bytes=50_000)
    written, before = tensors(tmp_path / "out"), tensors(folder)
    norm = "model.language_model.norm.weight"
    assert torch.equal(written.pop(norm), before.pop(norm) + 1)
    assert same(written, before)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    name = f"{FAMILIES[family][0]}ForConditionalGeneration"
    again, found = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert same(
        {n: t for n, t in again.state_dict().items() if n != norm},
        {n: t for n, t in hf.state_dict().items() if n != norm},
    )
    assert {name for name, _ in read_checkpoint(tmp_path / "out")} == {name for name, _ in export(model)}
    # Types that change are named at both places.
    half = load(folder, "bfloat16")
    save_checkpoint(export(half), folder, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    assert tensors(tmp_path / "half")["model.visual.patch_embed.proj.weight"].dtype == torch.float32


@in_a_group
def test_a_run_carries_it_from_checkpoint_to_checkpoint(whole, tmp_path):
    """Also after its first model is gone; and goes on from such a checkpoint exactly."""
    _, folder = whole("qwen3_5_text")
    source = shutil.copytree(folder, tmp_path / "source")
    untrained = {name: t for name, t in tensors(source).items() if name.startswith(("mtp.", "model.visual."))}
    config = make_config(source)
    trainer = make_trainer(config)
    trainer.update(make_rows(0))
    first = save(tmp_path / "run", 1, trainer, config, {"step": 1})
    held = tensors(first / "hf")
    assert same({name: held.pop(name) for name in untrained}, untrained)
    assert all(torch.equal(held[name], tensor) for name, tensor in weights(trainer).items())
    other = make_trainer(make_config(first / "hf"))
    assert restore(first, other) == {"step": 1}
    shutil.rmtree(source)
    assert same({name: t for name, t in tensors(first / "hf").items() if name in untrained}, untrained)
    loss = trainer.update(make_rows(1))["loss"]
    assert other.update(make_rows(1))["loss"] == loss
    save(tmp_path / "next", 2, other, make_config(first / "hf"), {})
    assert same(
        {n: t for n, t in tensors(tmp_path / "next/checkpoints/step_000002/hf").items() if n in untrained}, untrained
    )


@in_a_group
def test_files_that_change_meanwhile_are_refused(whole, tmp_path):
    from spell_megatron.weights.untrained import Untrained

    source = shutil.copytree(whole("qwen3_5_text")[1], tmp_path / "source")
    with Untrained(source, PolicyModel.load(source)) as untrained:
        content = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").rename(tmp_path / "moved")
        untrained.write(tmp_path / "fine.safetensors")
        (tmp_path / "moved").write_bytes(content[:-100])
        with pytest.raises(UserError, match="was changed while it was needed"):
            untrained.write(tmp_path / "broken.safetensors")


def test_an_index_with_a_tensor_that_is_not_there_is_refused(whole, tmp_path):
    from spell_megatron.weights.untrained import Untrained

    source = shutil.copytree(whole("qwen3_5_text")[1], tmp_path / "source")
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    index = dict.fromkeys([*load_file(source / "model-1.safetensors"), "model.visual.lost"], "model-1.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=r"model.visual.lost belongs in .*model-1.safetensors, but it is not there"):
        Untrained(source, PolicyModel.load(source))


@in_a_group
def test_a_text_model_may_have_further_layers_but_no_vision_tower(hf_checkpoint, tmp_path):
    _, folder = hf_checkpoint("qwen3_5_text")
    source = shutil.copytree(folder, tmp_path / "source")
    edit(lambda held: held.update({"mtp.fc.weight": torch.randn(3)}))(source)
    save_checkpoint(export(load(source)), source, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(source))
    edit(lambda held: held.update({"model.visual.pos_embed.weight": torch.randn(3)}))(source)
    with pytest.raises(UserError, match="does not explain"):
        load(source)
