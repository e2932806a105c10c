"""Hugging Face checkpoints to distributed checkpoints of every layout and back."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hf_models import CASES, apart, edit, make
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spell_megatron.cli import main
from spell_megatron.config.schema import ParallelConfig, TrainingConfig
from spell_megatron.errors import UserError
from spell_megatron.processes.folder_lock import FolderLock
from spell_megatron.training import backend
from spell_megatron.training.model import build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.convert import compare, hf_to_megatron, megatron_to_hf
from spell_megatron.weights.huggingface import load_weights

LAYOUTS = [
    {},
    {"tensor": 2},
    {"pipeline": 3},
    {"tensor": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 2},
    {"expert": 3, "pipeline": 2},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(case) -> folder of a random bfloat16 model of four layers with a file beside its weights."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            family, fields = CASES[case]
            hf = make(family, {**fields, "num_hidden_layers": 4, "num_key_value_heads": 2})
            hf.bfloat16().save_pretrained(made[case])
            (made[case] / "tokenizer_config.json").write_text('{"any": "tokenizer"}')
        return made[case]

    return get


def same(one: Path, two: Path) -> bool:
    left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact_in_every_layout(case, checkpoint, tmp_path):
    """bfloat16, bit by bit; 131 vocabulary entries are padded for two ranks, and four layers over three stages."""
    source = checkpoint(case)
    for number, layout in enumerate(LAYOUTS):
        if "expert" in layout and "moe" not in case and "gpt_oss" not in case:
            continue
        out, back = tmp_path / f"megatron{number}", tmp_path / f"hf{number}"
        hf_to_megatron(source, out, ParallelConfig(**layout))
        assert compare(out, source) == len(apart(load_file(source / "model.safetensors")))
        megatron_to_hf(out, back)
        assert same(source, back)
        assert (back / "tokenizer_config.json").read_text() == (out / "tokenizer_config.json").read_text()
        one, two = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
        assert one == two
        assert not (back / "metadata.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_types_are_kept(dtype, tmp_path, capsys):
    source, out, back = tmp_path / "source", tmp_path / "megatron", tmp_path / "back"
    make("qwen3_moe", CASES["qwen3_moe"][1]).to(dtype).save_pretrained(source)
    for way in ("hf-to-megatron", "megatron-to-hf"):
        hf = source if way == "hf-to-megatron" else back
        assert main(["convert", way, "--hf", str(hf), "--megatron", str(out), "--verify"]) == 0
    assert "are the same in both" in capsys.readouterr().out
    assert same(source, back)
    assert {tensor.dtype for tensor in load_file(back / "model.safetensors").values()} == {dtype}


@pytest.mark.parametrize("case", ["qwen3-moe-normalised", "qwen3_5_text"])
def test_mixed_types_are_kept(case, checkpoint, tmp_path):
    """Also those of tensors that Megatron joins with others, of other layers or of the same one."""
    source = shutil.copytree(checkpoint(case), tmp_path / "source")
    wide = ("A_log", "linear_attn.norm.weight", "model.norm.weight", "layers.1.self_attn.k_proj.weight")
    wide += ("layers.2.post_attention_layernorm.weight", "layers.0.mlp.experts.3.up_proj.weight")

    def widen(tensors):
        for name in tensors:
            if name.endswith(wide):
                tensors[name] = torch.randn(tensors[name].shape)
            elif name.endswith("layers.1.self_attn.v_proj.weight"):
                tensors[name] = tensors[name].half()

    edit(widen)(source)
    hf_to_megatron(source, tmp_path / "megatron", ParallelConfig(tensor=2, pipeline=2))
    assert compare(tmp_path / "megatron", source) == len(load_file(source / "model.safetensors"))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert same(source, tmp_path / "back")
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert tensor.dtype == load_file(source / "model.safetensors")[name].dtype, name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["qwen2-tied-yarn", "qwen3-moe-some-dense-layers"])
def test_megatron_itself_loads_it(case, checkpoint, tmp_path):
    from megatron.core import dist_checkpointing

    source, out = checkpoint(case), tmp_path / "out"
    hf_to_megatron(source, out, ParallelConfig(tensor=2, pipeline=3))
    policy, training = PolicyModel.load(source), TrainingConfig()
    backend.initialise(policy, training, "cpu")
    try:
        expected, found = build_model(policy, training), build_model(policy, training)
        load_weights(expected, source)
        found.load_state_dict(dist_checkpointing.load({"model": found.sharded_state_dict()}, str(out))["model"])
        for (name, one), (_, two) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
            assert torch.equal(one, two), name
    finally:
        backend.shutdown()


def test_the_command_and_its_refusals(checkpoint, tmp_path, capsys):
    source, out, back = checkpoint("qwen3"), tmp_path / "out", tmp_path / "back"
    hook = sys.excepthook
    capsys.readouterr()

    def spell(*arguments: object) -> tuple[int, str]:
        status = main(["convert", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    forth, home = ("hf-to-megatron", "--hf", source, "--megatron"), ("megatron-to-hf", "--megatron")
    assert spell(*forth, out, "--tp", 2, "--verify") == (0, f"{out}: done; all 47 tensors are the same in both\n")
    assert spell(*home, out, "--hf", back, "--verify")[0] == 0
    status, message = spell(*forth, out)
    assert status == 2 and "exists already" in message
    assert "exists already" in spell(*home, out, "--hf", back)[1]
    with FolderLock(tmp_path, "another", "", ".b.lock"):
        assert "in use by another" in spell(*forth, tmp_path / "b")[1]
        assert "in use by another" in spell(*home, out, "--hf", tmp_path / "b")[1]
    assert "does not divide" in spell(*forth, tmp_path / "b", "--tp", 3)[1]
    assert "--pp is 0" in spell(*forth, tmp_path / "b", "--pp", 0)[1]
    assert "no Megatron distributed checkpoint" in spell(*home, source, "--hf", tmp_path / "b")[1]
    assert sorted(os.listdir(tmp_path)) == ["back", "out"]
    assert sys.excepthook is hook  # torch's would begin an error's lines with the ranks that were made here


def test_experts_stored_together(checkpoint, tmp_path):
    """As transformers 5 can save them: converted and compared like experts that are stored one by one."""
    source, fused = checkpoint("qwen3-moe-normalised"), tmp_path / "fused"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(fused, save_original_format=False)
    assert not load_file(fused / "model.safetensors").keys() & {"model.layers.0.mlp.experts.0.up_proj.weight"}
    hf_to_megatron(fused, tmp_path / "megatron", ParallelConfig(expert=3))
    assert compare(tmp_path / "megatron", fused) == len(load_file(source / "model.safetensors"))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert same(source, tmp_path / "back")


def test_comparing_names_what_one_side_lacks(checkpoint, tmp_path):
    source, out = checkpoint("qwen2-tied-yarn"), tmp_path / "out"
    hf_to_megatron(source, out, ParallelConfig())
    other = shutil.copytree(source, tmp_path / "other")
    edit(lambda t: t.update({"lm_head.weight": torch.zeros_like(t["model.embed_tokens.weight"])}))(other)
    with pytest.raises(UserError, match=r"holds lm_head.weight with other values.*Set tie_word_embeddings to false"):
        compare(out, other)
    with pytest.raises(UserError, match="lm_head.weight with other values"):
        hf_to_megatron(other, tmp_path / "b", ParallelConfig())
    edit(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(other)
    assert compare(out, other) == len(load_file(source / "model.safetensors"))
    edit(lambda t: t.update({"value_head.weight": torch.zeros(1)}))(other)
    with pytest.raises(UserError, match="holds value_head.weight"):
        compare(out, other)


def test_damaged_inputs_are_named(checkpoint, tmp_path):
    source, out = checkpoint("qwen3"), tmp_path / "out"

    def refused(number: int, damage) -> str:
        broken = shutil.copytree(source, tmp_path / f"in{number}")
        damage(broken)
        with pytest.raises(UserError) as caught:
            hf_to_megatron(broken, out, ParallelConfig())
        assert not out.exists() and not (tmp_path / ".out.partial").exists()
        return str(caught.value)

    def cut(folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    assert "cut short" in refused(1, cut)
    assert "model.norm.weight" in refused(2, edit(lambda t: t.pop("model.norm.weight")))
    assert "has shape [47]" in refused(3, edit(lambda t: t.update({"model.norm.weight": torch.ones(47).bfloat16()})))
    integers = edit(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}))
    assert "has the type I32" in refused(4, integers)
    assert "gpt2" in refused(5, lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'))

    def index(content: str):
        def damage(folder):
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
            (folder / "model.safetensors.index.json").write_text(content)

        return damage

    lacking = refused(6, index('{"weight_map": {"model.norm.weight": "model-2.safetensors"}}'))
    assert "model-2.safetensors" in lacking or "lacks" in lacking
    for number, content in enumerate(
        ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}')
    ):
        said = refused(7 + number, index(content))
        assert "is not an index of safetensors files" in said and "could not be written" not in said

    good = tmp_path / "good"
    hf_to_megatron(source, good, ParallelConfig(tensor=2))

    def refused_back(number: int, damage) -> str:
        broken = shutil.copytree(good, tmp_path / f"back{number}")
        damage(broken)
        with pytest.raises(UserError) as caught:
            megatron_to_hf(broken, out)
        assert not out.exists() and not (tmp_path / ".out.partial").exists()
        return str(caught.value)

    def cut_piece(folder):
        piece = folder / "__1_0.distcp"
        piece.write_bytes(piece.read_bytes()[:1000])

    def other_model(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))

    def tie(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    assert "holds output_layer.weight, which its config.json does not explain" in refused_back(6, tie)
    assert "damaged" in refused_back(1, cut_piece)
    assert "damaged" in refused_back(2, lambda f: (f / "__0_0.distcp").unlink())
    assert "lacks .metadata" in refused_back(3, lambda f: (f / ".metadata").unlink())
    assert "different models" in refused_back(4, other_model)
    assert ".metadata is damaged" in refused_back(5, lambda f: (f / ".metadata").write_bytes(b"abc"))


def test_a_difference_is_found(checkpoint, tmp_path):
    source, out = checkpoint("qwen3"), tmp_path / "out"
    hf_to_megatron(source, out, ParallelConfig())
    other = shutil.copytree(source, tmp_path / "other")
    edit(lambda t: t["model.norm.weight"][3].add_(1))(other)
    with pytest.raises(UserError, match="model.norm.weight differs"):
        compare(out, other)


def test_no_room(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB left"):
        hf_to_megatron(checkpoint("qwen3"), tmp_path / "out", ParallelConfig())
    assert os.listdir(tmp_path) == []
