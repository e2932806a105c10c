"""Small random Hugging Face models of every supported family, for parity tests."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from spell_megatron.config.schema import TrainingConfig
from spell_megatron.training.model import TreeGPTModel, build_model
from spell_megatron.training.policy import PolicyModel
from spell_megatron.weights.huggingface import load_weights

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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CASES = {
    "llama": (LlamaConfig, {}),
    "llama-all-heads-tied": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-3-scaling": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "head_dim": 20}),
    "llama-attention-bias": (LlamaConfig, {"attention_bias": True}),
    "llama-mlp-bias": (LlamaConfig, {"mlp_bias": True, "rope_parameters": LINEAR_ROPE}),
    "llama-all-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied-yarn": (Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
    "qwen3-tied-wide-heads": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias-yarn": (Qwen3Config, {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN_ROPE}),
    "qwen3-one-group": (Qwen3Config, {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 1}),
    "qwen3-moe-normalised": (Qwen3MoeConfig, MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-not-normalised": (Qwen3MoeConfig, MOE | {"head_dim": 20, "norm_topk_prob": False}),
    "qwen3-moe-one-expert-chosen": (Qwen3MoeConfig, MOE | {"head_dim": 12, "num_experts_per_tok": 1}),
    "qwen3-moe-some-dense-layers": (
        Qwen3MoeConfig,
        MOE
        | {"head_dim": 16, "norm_topk_prob": True, "num_hidden_layers": 5, "decoder_sparse_step": 2}
        | {"mlp_only_layers": [3], "tie_word_embeddings": True},
    ),
}

MODELS = {
    LlamaConfig: LlamaForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
    Qwen3MoeConfig: Qwen3MoeForCausalLM,
}


def make(config_class: type, options: dict, seed: int = 0) -> torch.nn.Module:
    """A model with random weights everywhere: norms and biases too, so that a swapped one shows."""
    torch.manual_seed(seed)
    model = MODELS[config_class](config_class(**COMMON | options)).float().eval()
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
