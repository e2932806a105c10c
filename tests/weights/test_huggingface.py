"""Loading, exporting and saving, with real Megatron models."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import CASES, apart, edit, load
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spell_megatron.errors import UserError
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.huggingface import load_weights, save_checkpoint
from spell_megatron.weights.names import rules
from spell_megatron.weights.reshard import Export, export

pytestmark = pytest.mark.usefixtures("process_group")


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case, hf_checkpoint, tmp_path):
    """Hugging Face -> Megatron -> Hugging Face: equal bits and names, and transformers loads it."""
    hf, folder = hf_checkpoint(case)
    model = load(folder)
    stream = dict(export(model))
    assert same(stream, apart(load_file(folder / "model.safetensors")))
    assert list(stream) == [name for rule in rules(model.policy).values() for name in rule.names]
    save_checkpoint(export(model), folder, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(again.state_dict(), hf.state_dict())


def test_experts_of_a_layer_travel_as_one_tensor_that_fits_a_bucket(hf_checkpoint):
    """Again and again with the weights of the time; those that do not fit travel by themselves."""
    _, folder = hf_checkpoint("qwen3-moe-some-dense-layers")
    model, saved = load(folder), load_file(folder / "model.safetensors")
    streams = Export(model, fuse_experts=True)
    experts = sum(".experts." in name for name in saved)
    for room, expected in ((1 << 20, len(saved) - experts + 2), (1, len(saved))):
        for factor in (1, 2):
            stream = dict(streams.stream(room))
            assert len(stream) == expected
            assert same(apart(stream), {name: factor * tensor for name, tensor in saved.items()})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2 if factor == 1 else 0.5)


def test_large_models_are_written_in_parts(hf_checkpoint, tmp_path):
    _, folder = hf_checkpoint("qwen3-moe-normalised")
    model = load(folder)
    save_checkpoint(export(model), folder, tmp_path / "out", shard_bytes=50_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in export(model))
    largest = max(t.nbytes for _, t in export(model))
    assert all(sum(t.nbytes for t in load_file(file).values()) <= max(50_000, largest) for file in files)
    again = load(tmp_path / "out")
    assert same(dict(export(again)), dict(export(model)))


def test_side_files_and_type_are_carried_along(hf_checkpoint, tmp_path):
    _, folder = hf_checkpoint("qwen3-narrow-heads")
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "modeling.py",
    ):
        (source / name).write_text("{}")
    model = load(source, "bfloat16")
    save_checkpoint(export(model), source, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"),
    }
    assert PolicyModel.load(tmp_path / "out").dtype == torch.bfloat16
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_saving_replaces_only_when_complete(hf_checkpoint, tmp_path):
    _, folder = hf_checkpoint("qwen3-narrow-heads")
    model = load(folder)
    out = tmp_path / "out"
    save_checkpoint(export(model), folder, out)
    before = load_file(out / "model.safetensors")

    def breaks():
        yield from list(export(model))[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(breaks(), folder, out)
    assert os.listdir(tmp_path) == ["out"]
    assert same(load_file(out / "model.safetensors"), before)
    with torch.no_grad():
        model.decoder.final_layernorm.weight.add_(1)
    save_checkpoint(export(model), folder, out)
    assert os.listdir(tmp_path) == ["out"]
    assert same(load_file(out / "model.safetensors"), dict(export(model)))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_full_disk_is_a_plain_message(hf_checkpoint, tmp_path, monkeypatch):
    """The write really fails with ENOSPC; only the path is redirected to the device that is always full."""
    from spell_megatron.weights import huggingface

    real_open = Path.open
    _, folder = hf_checkpoint("qwen3-narrow-heads")
    model = load(folder)

    def open_full_disk(path, mode="r", *arguments, **options):
        full = mode == "wb" and path.name == "model.safetensors"
        return real_open(Path("/dev/full") if full else path, mode, *arguments, **options)

    monkeypatch.setattr(huggingface.Path, "open", open_full_disk)
    with pytest.raises(UserError, match="disk is full"):
        save_checkpoint(export(model), folder, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def damaged(folder, tmp_path, damage) -> str:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError) as caught:
        load(copy)
    return str(caught.value)


def test_missing_tensor(hf_checkpoint, tmp_path):
    message = damaged(
        hf_checkpoint("qwen3-narrow-heads")[1], tmp_path, edit(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    )
    assert "lacks model.layers.1.mlp.up_proj.weight, which" in message


def test_unexpected_tensor(hf_checkpoint, tmp_path):
    extra = edit(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(4)}))
    assert "model.layers.0.self_attn.q_proj.bias" in damaged(hf_checkpoint("qwen3-narrow-heads")[1], tmp_path, extra)


def test_head_of_a_tied_model_may_be_stored_too(hf_checkpoint, tmp_path):
    _, folder = hf_checkpoint("qwen2-tied-yarn")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    edit(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(copy)
    model = load(copy)
    assert "lm_head.weight" not in dict(export(model))


def test_another_head_of_a_tied_model_is_refused(hf_checkpoint, tmp_path):
    """Also where it differs in one bit or in its type: config.json says that it is not there."""
    _, folder = hf_checkpoint("qwen2-tied-yarn")

    def changed(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1e-3
        tensors["lm_head.weight"] = head

    message = damaged(folder, tmp_path / "a", edit(changed))
    assert "lm_head.weight with other values" in message and "Set tie_word_embeddings to false" in message
    other_type = edit(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].bfloat16()}))
    assert "lm_head.weight with other values" in damaged(folder, tmp_path / "b", other_type)


def test_all_tensors_in_excess_are_named(hf_checkpoint, tmp_path):
    _, folder = hf_checkpoint("qwen3-narrow-heads")
    names = [f"model.layers.{layer}.self_attn.q_proj.weight_scale_inv" for layer in range(3)]

    def ones(names):
        return {name: torch.ones(1) for name in names}

    message = damaged(folder, tmp_path / "a", edit(lambda t: t.update(ones(names[:2]))))
    assert f"holds {names[0]}, {names[1]}, which" in message
    extra = ones([*names, "model.vision.weight", "value_head.weight"])
    assert "and 2 more tensors" in damaged(folder, tmp_path / "b", edit(lambda t: t.update(extra)))


def test_a_missing_head_is_told_with_both_remedies(hf_checkpoint, tmp_path):
    message = damaged(hf_checkpoint("qwen3-narrow-heads")[1], tmp_path, edit(lambda t: t.pop("lm_head.weight")))
    assert "lacks lm_head.weight" in message and "set tie_word_embeddings to true" in message


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_experts_stored_together_are_read_bit_by_bit(shard_size, hf_checkpoint, tmp_path):
    """As transformers 5 can save them, in one file and in several."""
    model, folder = hf_checkpoint("qwen3-moe-some-dense-layers")
    model.save_pretrained(tmp_path, save_original_format=False, max_shard_size=shard_size)
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.1.mlp.experts.gate_up_proj" in stored
    assert same(dict(export(load(tmp_path))), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("case", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_names_within_a_larger_model_are_read(case, hf_checkpoint, tmp_path):
    """transformers keeps them when it saves the language model of a model that sees images."""
    _, folder = hf_checkpoint(case)
    shutil.copytree(folder, tmp_path / "within")
    tensors = load_file(folder / "model.safetensors")
    within = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(within, tmp_path / "within" / "model.safetensors")
    assert same(dict(export(load(tmp_path / "within"))), tensors)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "within")
    assert same(again.state_dict(), AutoModelForCausalLM.from_pretrained(folder).state_dict())
    save_file(within | {"model.norm.weight": torch.zeros(48)}, tmp_path / "within" / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight twice: also as model.language_model.norm.weight"):
        load(tmp_path / "within")


def test_experts_of_other_shapes_are_refused(hf_checkpoint, tmp_path):
    model, _ = hf_checkpoint("qwen3-moe-normalised")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    name = "model.layers.0.mlp.experts.gate_up_proj"

    def refused(number: int, change) -> str:
        return damaged(tmp_path / "fused", tmp_path / str(number), edit(change))

    turned = refused(1, lambda t: t.update({name: t[name].transpose(1, 2).contiguous()}))
    assert "experts.0.gate_proj.weight" in turned and "has shape [24, 80]" in turned
    fewer = refused(2, lambda t: t.update({name: t[name][:5].clone()}))
    assert "lacks model.layers.0.mlp.experts.5.gate_proj.weight" in fewer
    twice = {"model.layers.0.mlp.experts.2.up_proj.weight": torch.zeros(40, 48)}
    assert f"holds {next(iter(twice))} twice: by itself and within {name}" in refused(3, lambda t: t.update(twice))


def test_wrong_shape(hf_checkpoint, tmp_path):
    message = damaged(
        hf_checkpoint("qwen3-narrow-heads")[1],
        tmp_path,
        edit(lambda t: t.update({"model.norm.weight": torch.ones(47)})),
    )
    assert "model.norm.weight" in message and "[47]" in message and "[48]" in message


def test_truncated_file(hf_checkpoint, tmp_path):
    def cut(copy):
        with open(copy / "model.safetensors", "r+b") as file:
            file.truncate(os.path.getsize(copy / "model.safetensors") - 1000)

    assert "cut short" in damaged(hf_checkpoint("qwen3-narrow-heads")[1], tmp_path, cut)


def test_missing_weights(hf_checkpoint, tmp_path):
    message = damaged(
        hf_checkpoint("qwen3-narrow-heads")[1], tmp_path, lambda copy: (copy / "model.safetensors").unlink()
    )
    assert "holds no weights" in message


def test_missing_shard_bad_index_and_stray_entry(hf_checkpoint, tmp_path):
    _, folder = hf_checkpoint("qwen3-narrow-heads")
    model = load(folder)
    sharded = tmp_path / "sharded"
    save_checkpoint(export(model), folder, sharded, shard_bytes=50_000)
    index = sharded / "model.safetensors.index.json"

    def unlink(copy):
        (copy / "model-00002-of-00007.safetensors").unlink(missing_ok=False)

    def misplace(copy):
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = "model-00001-of-00007.safetensors"
        (copy / index.name).write_text(json.dumps(content))

    assert len(list(sharded.glob("*.safetensors"))) == 7
    assert "model-00002-of-00007.safetensors" in damaged(sharded, tmp_path / "a", unlink)
    assert "model.norm.weight" in damaged(sharded, tmp_path / "b", misplace)
    assert "not an index" in damaged(sharded, tmp_path / "c", lambda copy: (copy / index.name).write_text("{"))

    def add_unlisted(copy):
        file = copy / "model-00003-of-00007.safetensors"
        save_file(load_file(file) | {"value_head.weight": torch.ones(1)}, file)

    assert "holds value_head.weight, which" in damaged(sharded, tmp_path / "d", add_unlisted)
    both = damaged(sharded, tmp_path / "e", lambda copy: shutil.copy(folder / "model.safetensors", copy))
    assert "holds weights twice: model.safetensors" in both


def test_nothing_is_loaded_from_a_faulty_checkpoint(hf_checkpoint, tmp_path):
    """The check comes first: a fault in the last tensor leaves the first one alone."""
    _, folder = hf_checkpoint("qwen3-narrow-heads")
    model = load(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    edit(lambda t: [x.add_(1) for x in t.values()] and t.update({"lm_head.weight": torch.ones(2, 2)}))(copy)
    with pytest.raises(UserError):
        load_weights(model, copy)
    assert same(dict(export(model)), load_file(folder / "model.safetensors"))
