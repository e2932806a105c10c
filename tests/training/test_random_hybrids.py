"""Random hybrid models over random forests against transformers, and through conversions."""

import json
import random
from pathlib import Path

import pytest
import torch
from families import hf_model
from hf_models import apart, edit, load
from safetensors.torch import load_file

from spell_megatron.config.schema import ParallelConfig, TrainingConfig
from spell_megatron.training import backend
from spell_megatron.training.layout import layout_faults
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.convert import hf_to_megatron, megatron_to_hf
from spell_megatron.weights.reshard import local_parameters


def linear_layers(rng: random.Random) -> dict:
    key_heads = rng.randint(1, 4)
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * rng.randint(1, 4),
        "linear_key_head_dim": rng.randint(2, 24),
        "linear_value_head_dim": rng.randint(1, 24),
        "linear_conv_kernel_dim": rng.randint(2, 4),
    }


def rotary(rng: random.Random, head_dim: int) -> dict:
    """Of any even number of dimensions, with and without sections of positions."""
    pairs = rng.randint(1, head_dim // 2)
    rope = {"rope_type": rng.choice(["default", "default", "linear", "yarn"]), "rope_theta": rng.choice([1e4, 1e7])}
    rope |= {"partial_rotary_factor": 2 * pairs / head_dim}
    if rope["rope_type"] != "default":
        rope |= {"factor": rng.choice([2.0, 4.0]), "original_max_position_embeddings": 64}
    if rng.random() < 0.5:
        height = rng.randint(0, pairs)
        width = rng.randint(0, pairs - height)
        rope |= {"mrope_section": [pairs - height - width, height, width], "mrope_interleaved": True}
    return rope


def kinds(rng: random.Random, layers: int) -> dict:
    """By an interval, as transformers makes them from it, or one by one."""
    if rng.random() < 0.5:
        interval = rng.randint(1, layers)
        names = ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(layers)]
        return {"full_attention_interval": interval, "layer_types": names}
    names = rng.choices(["linear_attention", "full_attention"], k=layers)
    names[rng.randrange(layers)] = "full_attention"
    return {"layer_types": names}


def hybrid(rng: random.Random) -> tuple[str, dict]:
    """A family and the fields of config.json."""
    layers, groups, head_dim = rng.randint(1, 5), rng.randint(1, 3), 2 * rng.randint(2, 16)
    fields = {
        "vocab_size": rng.randint(20, 200),
        "hidden_size": 2 * rng.randint(4, 40),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * rng.randint(1, 4),
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "intermediate_size": rng.randint(8, 90),
        "max_position_embeddings": 256,
        "initializer_range": 0.1,  # with more, rounding grows from layer to layer
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.3,
        "rope_parameters": rotary(rng, head_dim),
        "vision": rng.random() < 0.4,
    }
    fields |= kinds(rng, layers) | linear_layers(rng)
    if rng.random() < 0.5:
        return "qwen3_5_text", fields
    experts = rng.randint(2, 9)
    fields |= {"num_experts": experts, "num_experts_per_tok": rng.randint(2, experts)}
    widths = {"moe_intermediate_size": rng.randint(4, 40), "shared_expert_intermediate_size": rng.randint(4, 40)}
    return "qwen3_5_moe_text", fields | widths


def forest(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(depth of each token, end of each token's subtree, places of each path) of random trees in depth-first order."""
    parents: list[int] = []
    path: list[int] = []
    for token in range(rng.randint(1, 90)):
        if rng.random() > 0.85:
            path = path[: rng.randint(0, len(path))]
        parents.append(path[-1] if path else -1)
        path.append(token)
    depth, end = [0] * len(parents), list(range(1, len(parents) + 1))
    for token, parent in enumerate(parents):
        depth[token] = depth[parent] + 1 if parent >= 0 else 0
    for token, parent in reversed(list(enumerate(parents))):
        if parent >= 0:
            end[parent] = max(end[parent], end[token])
    paths = []
    for token in set(range(len(parents))) - set(parents):
        places = []
        while token >= 0:
            places.append(token)
            token = parents[token]
        paths.append(torch.tensor(places[::-1]))
    return torch.tensor(depth), torch.tensor(end), paths


def save(rng: random.Random, family: str, fields: dict, seed: int, folder: Path) -> torch.nn.Module:
    """transformers' model, written with and without layers that predict further tokens, the kinds of its layers by an
    interval if the fields have one."""
    hf = hf_model(family, seed, **{name: value for name, value in fields.items() if value is not False}).eval()
    for name, parameter in hf.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    hf.set_experts_implementation("eager")  # grouped products want sizes of 16 bytes
    hf.save_pretrained(folder)
    if rng.random() < 0.5:
        edit(lambda tensors: tensors.update({"mtp.fc.weight": torch.randn(4, 8).bfloat16()}))(folder)
    config = json.loads((folder / "config.json").read_text())
    if interval := fields.get("full_attention_interval"):
        text = config.get("text_config", config)
        del text["layer_types"]
        text["full_attention_interval"] = interval
    (folder / "config.json").write_text(json.dumps(config))
    return hf


def logits(model, tokens, depth, end):
    hidden = model(tokens[None], depth[None], end)
    return model.output_layer(hidden, weight=model.output_weight)[0][:, 0]


def by_name(model) -> dict[str, torch.Tensor]:
    """Gradients by Hugging Face name."""
    pairs = [(rule, parameter.grad) for rule, parameter in local_parameters(model)]
    found = [(rule, torch.zeros(()) if grad is None else grad) for rule, grad in pairs]
    return {
        name: part
        for rule, grad in found
        if grad.dim()
        for name, part in zip(rule.names, rule.whole([grad]), strict=True)
    }


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative, over all tensors together."""
    ours, theirs = (torch.cat([x[name].flatten() for name in sorted(found)]) for x in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of a checkpoint."""
    return apart({name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()})


def some_layout(rng: random.Random, folder: Path) -> ParallelConfig:
    arch = PolicyModel.load(folder).arch
    while True:
        sizes = {"tensor": rng.randint(1, 3), "pipeline": rng.randint(1, 3)}
        if arch.experts:
            sizes |= {"expert": rng.randint(1, 3), "expert_tensor": rng.randint(1, 2)}
        parallel = ParallelConfig(**sizes)
        if not list(layout_faults(arch, parallel)):
            return parallel


@pytest.mark.parametrize("seed", range(12))
def test_a_random_hybrid_is_transformers_over_every_path_and_survives_conversion(seed, tmp_path):
    """Logits within 1e-4, gradients of all parameters within 1e-5 relative, every tensor of a round trip bit by bit."""
    rng = random.Random(seed)
    family, fields = hybrid(rng)
    depth, end, paths = forest(rng)
    hf = save(rng, family, fields, seed, tmp_path / "hf")
    parallel = some_layout(rng, tmp_path / "hf")
    torch.manual_seed(seed)
    tokens = torch.randint(0, fields["vocab_size"], depth.shape)
    upstream = [torch.randn(len(path), fields["vocab_size"]) for path in paths]

    backend.initialise(PolicyModel.load(tmp_path / "hf"), TrainingConfig(), "cpu")
    try:
        model = load(tmp_path / "hf")
        ours = logits(model, tokens, depth, end)
        sum((ours[path] * weight).sum() for path, weight in zip(paths, upstream)).backward()
        found = by_name(model)
    finally:
        backend.shutdown()
    furthest = 0.0
    for path, weight in zip(paths, upstream):
        alone = hf(input_ids=tokens[path][None]).logits[0]
        furthest = max(furthest, (ours[path] - alone).abs().max().item())
        (alone * weight).sum().backward()
    expected = apart({name: x.grad for name, x in hf.named_parameters() if x.grad is not None})
    gradient = difference(found, expected)
    print(f"{family} {parallel}: logits differ by {furthest:.1e}, gradients by {gradient:.1e} relative")
    assert furthest <= 1e-4 and gradient <= 1e-5

    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", parallel)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    first, again = (stored(tmp_path / folder) for folder in ("hf", "back"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name].view(torch.uint8), again[name].view(torch.uint8)) for name in first)
