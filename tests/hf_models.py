"""Small random Hugging Face models of every supported family, for parity tests."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from families import FAMILIES, LLAMA3_ROPE, hf_model
from safetensors.torch import load_file, save_file

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.model import TreeGPTModel, build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.huggingface import load_weights
from spell_megatron.weights.names import expert_parts

COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MOE = {"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 3}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

# case: (family, fields of config.json)
CASES = {family: (family, MOE if "num_experts" in fields else {}) for family, (_, fields) in FAMILIES.items()} | {
    "llama-plain": ("llama", {"rope_parameters": None, "head_dim": None}),
    "llama-all-heads-tied": (
        "llama",
        {"rope_parameters": None, "head_dim": None, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "llama-3-scaling": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 32}, "head_dim": 20},
    ),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True, "rope_parameters": LINEAR_ROPE}),
    "llama-all-biases": (
        "llama",
        {"rope_parameters": None, "head_dim": None, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    "mistral-wide-heads": ("mistral", {"head_dim": 32}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied-yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3-narrow-heads": ("qwen3", {"head_dim": 12}),
    "qwen3-tied-wide-heads": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias-yarn": ("qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN_ROPE}),
    "qwen3-one-group": ("qwen3", {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 1}),
    "qwen3_5-attention-last": (
        "qwen3_5_text",
        {"layer_types": ["linear_attention"] * 2 + ["full_attention"], "tie_word_embeddings": True, "head_dim": 16},
    ),
    "qwen3_5-linear-scaling": (
        "qwen3_5_text",
        {"rope_parameters": LINEAR_ROPE | {"partial_rotary_factor": 0.5}, "linear_conv_kernel_dim": 2},
    ),
    "qwen3_5-yarn": (
        "qwen3_5_text",
        {"rope_parameters": YARN_ROPE | {"partial_rotary_factor": 0.5}, "layer_types": ["full_attention"]},
    ),
    "qwen3_5-moe-attention-bias": ("qwen3_5_moe_text", MOE | {"attention_bias": True, "num_key_value_heads": 4}),
    "qwen3-moe-normalised": ("qwen3_moe", MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-not-normalised": ("qwen3_moe", MOE | {"head_dim": 20, "norm_topk_prob": False}),
    "qwen3-moe-one-expert-chosen": (
        "qwen3_moe",
        MOE | {"head_dim": 12, "num_experts_per_tok": 1, "norm_topk_prob": False},
    ),
    "qwen3-moe-some-dense-layers": (
        "qwen3_moe",
        MOE
        | {"head_dim": 16, "norm_topk_prob": True, "num_hidden_layers": 5, "decoder_sparse_step": 2}
        | {"mlp_only_layers": [3], "tie_word_embeddings": True},
    ),
}


def make(family: str, fields: dict, seed: int = 0) -> torch.nn.Module:
    """A model with random weights everywhere: norms and biases too, so that a swapped one shows."""
    model = hf_model(family, seed, **COMMON | fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def load(folder: Path, dtype: str = "float32", **training) -> TreeGPTModel:
    """The Megatron model with the weights of this folder; there must be process groups."""
    model = build_model(PolicyModel.load(folder, dtype), TrainingConfig(**training))
    load_weights(model, folder)
    return model


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Something to be done to a checkpoint folder: `change` its tensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def apart(stream: Iterable[tuple[str, torch.Tensor]] | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with each expert by itself, whether a tensor had all of a layer or not."""
    tensors, whole = {}, set(dict(stream))
    for name, tensor in dict(stream).items():
        bias = name if name.endswith("_bias") else f"{name}_bias"
        parts = expert_parts(name, tuple(tensor.shape), bias in whole)
        tensors |= {own: tensor[part.expert, part.rows].clone() for own, part in parts.items()} or {
            name: tensor.clone()
        }
    return tensors
