"""Tiny policies, batches and runs shared by the trainer's tests and the processes they start."""

from pathlib import Path

import numpy as np
import torch
import transformers

from spell_megatron.config import Config
from spell_megatron.training.model import build_model
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.trainer import Trainer
from spell_megatron.weights.huggingface import load_weights
from spell_megatron.weights.reshard import export

VOCAB = 128
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=512,
    initializer_range=0.2,
)
_MOE = dict(
    moe_intermediate_size=48,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    head_dim=16,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    router_aux_loss_coef=0.0,
)
FAMILIES = {
    "llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "qwen2.5": ("Qwen2Config", "Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(tie_word_embeddings=True, head_dim=32)),
    # One key-value head, a vocabulary that 2 does not divide, layers that 2 does not divide.
    "odd": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        dict(
            tie_word_embeddings=True,
            head_dim=16,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=1,
            vocab_size=VOCAB + 3,
        ),
    ),
    "three_heads": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        dict(tie_word_embeddings=False, head_dim=16, num_attention_heads=3, num_key_value_heads=3),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(tie_word_embeddings=False, **_MOE)),
}


def make_policy(family: str, folder: Path) -> None:
    """A random Hugging Face checkpoint without a tokenizer."""
    config, model, extra = FAMILIES[family]
    torch.manual_seed(0)
    hf = getattr(transformers, model)(getattr(transformers, config)(**{**_COMMON, **extra})).float()
    for name, parameter in hf.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    hf.save_pretrained(folder)


def make_rows(seed: int = 0, groups: int = 4, group_size: int = 4) -> list[Row]:
    """Groups of responses to shared prompts, one prompt that continues another's response, a repeated row."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(prompt, response):
        weights, logprobs = rng.normal(size=len(response)), -rng.exponential(size=len(response))
        rows.append(
            Row(
                np.concatenate([prompt, response]),
                len(prompt),
                weights.astype(np.float32),
                logprobs.astype(np.float32),
            )
        )

    for _ in range(groups):
        prompt = rng.integers(0, VOCAB, rng.integers(5, 40))
        for _ in range(group_size):
            add(prompt, rng.integers(0, VOCAB, rng.integers(1, 20)))
    first = rows[0]
    add(first.tokens[:-1], rng.integers(0, VOCAB, 6))
    add(first.tokens[: first.prompt_length], first.tokens[first.prompt_length :])
    add(np.array([3]), rng.integers(0, VOCAB, 5))
    return rows


def make_config(folder: Path, **overrides) -> Config:
    """`overrides`: dotted names with `__` for the dot."""
    values = {
        "run": {"device": "cpu", "steps": 10},
        "model": {"path": str(folder), "dtype": "float32"},
        "data": {"documents": "none.parquet"},
        "training": {
            "tokens_per_microbatch": 100,
            "logprob_chunk": 16,
            "optimizer": {"lr": 1e-3, "clip_grad": 1e6, "distributed": False},
        },
    }
    for name, value in overrides.items():
        *path, last = name.split("__")
        node = values
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return Config(**values)


def make_trainer(config: Config) -> Trainer:
    hf_config = transformers.AutoConfig.from_pretrained(config.model.path)
    model = build_model(hf_config, config)
    load_weights(model, hf_config, config.model.path)
    return Trainer(config, hf_config, model)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().float().clone() for name, tensor in export(trainer.model, trainer.hf_config)
    }


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of the last update by Hugging Face name: the export's cuts and joins are linear."""
    kept = [parameter.data for parameter in trainer.model.parameters()]
    for parameter in trainer.model.parameters():
        parameter.data = parameter.main_grad.clone()
    result = weights(trainer)
    for parameter, data in zip(trainer.model.parameters(), kept):
        parameter.data = data
    return result


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference relative to the norm, over all tensors."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    names = sorted(a)
    x, y = (torch.cat([d[name].flatten().double() for name in names]) for d in (a, b))
    return ((x - y).norm() / y.norm()).item()
