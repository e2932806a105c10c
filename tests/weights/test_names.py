"""Names and layouts, without a Megatron model."""

import pytest
import torch
from hf_models import CASES

from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.names import expert_parts, global_name, rules, stored_tensors


@pytest.mark.parametrize("case", CASES)
def test_rules_name_every_tensor_of_the_checkpoint(case, hf_checkpoint):
    """The saved checkpoint, transformers' own per-expert names included, is what the rules describe."""
    from safetensors import safe_open

    hf, folder = hf_checkpoint(case)
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    described = {
        name: shapes[0] if len(shapes) == 1 else (len(shapes), *shapes[0])
        for name, parts in stored_tensors(PolicyModel.of(hf.config)).items()
        for shapes in [list(parts.values())]
    }
    assert described == saved


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", ["llama-all-biases", "qwen2", "qwen3-moe-some-dense-layers"])
def test_shards_make_the_whole_again(case, size, hf_checkpoint):
    """Bit by bit, with a vocabulary (131) that the size does not divide, and with fewer groups than ranks."""
    hf, _ = hf_checkpoint(case)
    generator = torch.Generator().manual_seed(0)
    for name, rule in rules(PolicyModel.of(hf.config)).items():
        tensors = [torch.randn(shape, generator=generator) for shape in rule.shapes]
        shards = [rule.shard(tensors, size, rank) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1, name
        for got, expected in zip(rule.whole(shards), tensors):
            assert torch.equal(got, expected), name


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (3, 1), (1, 2), (2, 4)])
def test_shards_of_all_experts_make_one_tensor(groups, size, hf_checkpoint):
    """As transformers 5 stores it: `expert_parts` finds every expert's matrices in it."""
    hf, _ = hf_checkpoint("qwen3-moe-normalised")
    generator = torch.Generator().manual_seed(0)
    table = [rule for rule in rules(PolicyModel.of(hf.config)).values() if rule.expert is not None and rule.layer == 1]
    for layout in {rule.layout for rule in table}:
        experts = [rule for rule in table if rule.layout is layout]
        tensors = {name: torch.randn(s, generator=generator) for r in experts for name, s in zip(r.names, r.shapes)}

        def shard(group: int, rank: int) -> torch.Tensor:
            held = experts[group * len(experts) // groups : (group + 1) * len(experts) // groups]
            return torch.stack([rule.shard([tensors[name] for name in rule.names], size, rank) for rule in held])

        shards = [shard(group, rank) for group in range(groups) for rank in range(size)]
        whole = experts[0].whole_experts(shards, size)
        parts = expert_parts(experts[0].stored_experts, whole.shape)
        assert parts.keys() == tensors.keys()
        for name, part in parts.items():
            assert torch.equal(whole[part.expert, part.rows], tensors[name]), name


def test_shards_compute_the_same_projection():
    """What the layouts are for: each rank's query heads lie beside the key-value heads they share, and each
    rank's gate beside its up."""
    from transformers import Qwen3Config

    table = rules(PolicyModel.of(Qwen3Config(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4)))
    q, k, v = torch.randn(16, 8), torch.randn(8, 8), torch.randn(8, 8)
    rule = table["decoder.layers.0.self_attention.linear_qkv.weight"]
    second = rule.shard([q, k, v], size=2, rank=1)
    assert torch.equal(second, torch.cat([q[8:], k[4:], v[4:]]))
    gate, up = torch.randn(10, 8), torch.randn(10, 8)
    rule = table["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(rule.shard([gate, up], size=2, rank=0), torch.cat([gate[:5], up[:5]]))


@pytest.mark.parametrize(
    "local, expected",
    [
        ("decoder.layers.1.input_layernorm.weight", "decoder.layers.11.input_layernorm.weight"),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.10.input_layernorm.weight",
        ),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.10.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.2.mlp.experts.linear_fc1.weight3",
            "decoder.layers.12.mlp.experts.local_experts.67.linear_fc1.weight",
        ),
        (
            "decoder.layers.2.mlp.experts.local_experts.0.linear_fc2.weight",
            "decoder.layers.12.mlp.experts.local_experts.64.linear_fc2.weight",
        ),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_global_names(local, expected):
    assert global_name(local, first_layer=10, first_expert=64) == expected
