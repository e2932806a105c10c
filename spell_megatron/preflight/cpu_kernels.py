"""Sizes and types of models for which vLLM has kernels on CPUs. With others an engine dies at its first request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spell_megatron.config.schema import Config
from spell_megatron.preflight.findings import Findings

if TYPE_CHECKING:
    from spell_megatron.training.policy import Architecture, DeltaNet

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Dimensions of attention heads."""
LINEAR_HEAD_SIZES = (64, 128)
"""Dimensions of the heads of linear-attention layers; keys and values must have the same."""
CONVOLUTION = 4
"""Tokens that the convolution of a linear-attention layer sees."""
EXPERT_BLOCK = 32
"""What divides the hidden size of a mixture of experts and, where experts have biases, a worker's share of their
width."""


def check_cpu_kernels(found: Findings, config: Config, arch: Architecture) -> None:
    """Engines that run on CPUs can compute the model's layers."""
    if config.rollout.urls:
        return
    if arch.head_dim not in HEAD_SIZES:
        found.fault(
            "model.path",
            f"the model's attention heads have {arch.head_dim} dimensions, and vLLM's engines on CPUs "
            f"serve only {', '.join(map(str, HEAD_SIZES))}. Use another model, or a GPU",
        )
    if arch.delta_net:
        _check_linear_layers(found, config.model.dtype, arch.delta_net)
    if arch.experts:
        _check_experts(found, config.rollout.tensor_parallel, arch)


def _check_experts(found: Findings, workers: int, arch: Architecture) -> None:
    if arch.hidden % EXPERT_BLOCK:
        found.fault(
            "model.path",
            f"the model has experts and a hidden size of {arch.hidden}; vLLM's engines on CPUs serve only multiples of "
            f"{EXPERT_BLOCK}. Use another model, or a GPU",
        )
    share = arch.expert_ffn // workers
    if arch.biased_experts and share % EXPERT_BLOCK:
        found.fault(
            "rollout.tensor_parallel model.path",
            f"of the {arch.expert_ffn} rows of an expert each of {workers} workers has {share}; vLLM's engines on CPUs "
            f"serve only multiples of {EXPERT_BLOCK}. Choose another number, or use a GPU",
        )


def _check_linear_layers(found: Findings, dtype: str, sizes: DeltaNet) -> None:
    if dtype != "bfloat16":
        found.fault(
            "model.dtype model.path",
            "vLLM's engines on CPUs compute the model's linear-attention layers (gated delta nets) only in bfloat16. "
            "Set model.dtype to bfloat16, or use a GPU",
        )
    if sizes.key_dim != sizes.value_dim or sizes.key_dim not in LINEAR_HEAD_SIZES:
        found.fault(
            "model.path",
            f"the heads of the model's linear layers have keys of {sizes.key_dim} dimensions and values of "
            f"{sizes.value_dim}. vLLM's engines on CPUs serve only those where both have the same number, "
            f"{' or '.join(map(str, LINEAR_HEAD_SIZES))}. Use another model, or a GPU",
        )
    if sizes.width != CONVOLUTION:
        found.fault(
            "model.path",
            f"the convolutions of the model's linear layers see {sizes.width} tokens, and those of vLLM's engines "
            f"on CPUs {CONVOLUTION}. Use another model, or a GPU",
        )
